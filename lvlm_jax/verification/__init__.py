"""Proof that a checkpoint loads, answers and saves here as in transformers: `lvlm verify`."""
