"""Tar shards, local and remote: resized caches and WebDataset tars."""
