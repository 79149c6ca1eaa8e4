"""Training: losses, optimizer, the loop, checkpoints, and the recipes built from them."""
