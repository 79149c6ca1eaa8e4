"""The objectives of fine-tuning, one file each; `training.registry` finds them by their names."""
