"""Helpers of several tests. `typecheck` is imported here because jaxtyping imports only its package."""

from helpers import typecheck as typecheck
