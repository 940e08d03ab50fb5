"""Training: trainer, optimizers, parallelism, checkpoints, metrics."""
