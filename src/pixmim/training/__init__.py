"""The loop that all training goes through, and what stands around it: optimizer, processes, checkpoints, log."""
