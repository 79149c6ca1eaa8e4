"""A server with OpenAI's interface; every request chooses a method and its strengths.

    HTTP (`app`, one event loop)  →  `prompts` (threads lay out prompts)  →  `engine` (one thread, the device)

`chat` parses requests and `replies` writes answers; `catalogue` turns a model's name into a method; a `lane` is a
batch of rows whose methods have one structure. `docs/serving.md` is for operators.
"""
