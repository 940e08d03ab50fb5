"""Images in tars, near and far: caches of our own, and the WebDataset shards of others."""
