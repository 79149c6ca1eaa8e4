"""Turns messages, images or a processor's arrays into a token layout, and tokens into text."""

import os

# Without PyTorch, transformers says on import that "models won't be available"; the models here need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
