"""Decode image files within bounds on bytes, pixels and time."""
