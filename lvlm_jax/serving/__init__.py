"""A server with OpenAI's interface, and a method with its strengths for every request.

    HTTP (`app`, one event loop)  →  `prompts` (a pool of threads lays out)  →  `engine` (one thread, the device)

`chat` reads requests and `replies` writes answers; `catalogue` turns a model's name into a method; `lanes` are batches
of rows whose methods have one structure. `docs/serving.md` is for those who run it.
"""
