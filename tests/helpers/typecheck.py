"""The suite's run-time type checker: beartype, which accepts an int for a float as PEP 484 does."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True))
