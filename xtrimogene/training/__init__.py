"""Training: a pre-training run, what decides it, its folder, checkpoints, log and ranks."""
