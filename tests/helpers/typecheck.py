"""The run-time type checker of the suite: beartype, with Python's own rule that an int may stand for a float."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True))
