"""Helpers of tests: tiny."""

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
