"""From what users have (messages, images, a processor's arrays) to a token layout, and from tokens to text."""
