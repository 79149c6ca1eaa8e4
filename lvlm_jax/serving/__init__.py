"""A server with OpenAI's interface; every request chooses a method and its strengths.

    HTTP (`app`, one event loop)  →  `prompts` (a pool of threads lays out)  →  `engine` (one thread, the device)

`chat` parses requests and `replies` writes answers; `catalogue` turns a model's name into a method; `lanes` are batches
of rows whose methods have one structure. `docs/serving.md` is for operators.
"""
