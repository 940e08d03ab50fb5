"""What several tests share. `typecheck` is imported here because jaxtyping imports only the package it is in."""

from helpers import typecheck as typecheck
