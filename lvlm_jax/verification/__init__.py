"""`lvlm verify`: checks that a checkpoint loads, answers and saves here as in transformers."""
