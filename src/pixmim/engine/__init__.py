"""The machinery around the loop: optimizer, schedule, device, checkpoints, log, signals, advice."""
