"""Bytes to pixels: any picture file, in the form of a run."""
