"""Training rows: files, formats, pairs, and batches of them."""
