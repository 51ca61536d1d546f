"""The training engine: run, trainer, checkpoints, processes."""
