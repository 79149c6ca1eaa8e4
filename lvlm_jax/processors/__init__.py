"""Turns messages, images or a processor's arrays into a token layout, and tokens into text."""
