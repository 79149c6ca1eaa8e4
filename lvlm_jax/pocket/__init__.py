"""The pocket world: small drawn scenes, their annotations and questions, the tokenizer and the shipped checkpoint."""
