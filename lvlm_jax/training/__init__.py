"""Training: objectives and their registry, data, the loop, checkpoints, fine-tuning of a checkpoint."""
