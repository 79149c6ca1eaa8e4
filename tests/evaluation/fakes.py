"""A stand-in for a model: its answers follow from prompt, pictures, method and seed alone, and cost nothing."""

import hashlib
import time
from types import SimpleNamespace

import numpy as np

from lvlm_jax.processors.inputs import EncodedImage

YES, NO = 1, 2
VOCABULARY = 8


def tokenizer(text, add_special_tokens=True):
    """One token for yes and one for no, however written; bytes for anything else."""
    word = {"yes": [YES], "no": [NO]}.get(text.strip().lower())
    return {"input_ids": word or [3 + byte % (VOCABULARY - 3) for byte in text.encode()]}


# Writes every text.
TEMPLATE = "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }} {% endfor %}{% endfor %}"


class Oracle:
    """Answers yes or no by a hash of the question and its images.

    Attributes:
        encoded: how many pictures went through the tower, one number for each time it ran.
        asked: how many prompts were answered.
    """

    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=TEMPLATE)
    config = SimpleNamespace(tokens_per_image=1)
    mesh = None

    def __init__(self, pause: float = 0.0, caption: str = ""):
        self.pause, self.caption = pause, caption
        self.encoded, self.asked = [], 0

    def encode_images(self, images):
        self.encoded.append(len(images))
        means = [np.asarray(image, np.float32).mean(axis=(0, 1)) for image in images]
        return [EncodedImage(mean[:, None, None], mean[None]) for mean in means]

    def _digest(self, conversation, *more):
        digest = hashlib.sha256(repr(more).encode())
        for part in (part for message in conversation for part in message["content"]):
            if part["type"] == "text":
                digest.update(part["text"].encode())
            else:  # encoded, or as it is
                digest.update(getattr(part["image"], "tokens", part["image"]).tobytes())
        return digest.digest()

    def generate(self, messages, method, max_new_tokens, temperature, top_p, seed):
        time.sleep(self.pause)
        self.asked += len(messages)
        drawn = seed if temperature else [None] * len(messages)
        texts = []
        for conversation, own in zip(messages, drawn, strict=True):
            byte = self._digest(conversation, type(method).__name__, own)[0]
            texts.append(self.caption if self.caption else f"{'Yes' if byte % 2 else 'No'}, it is {byte}.")
        return SimpleNamespace(text=texts, tokens=[text.split() for text in texts], finish_reason=["stop"] * len(texts))

    def generate_many(self, requests, batch_size, **settings):
        for number, (messages, seed) in enumerate(requests):
            yield number, self.generate([messages], seed=[seed], **settings)

    def prefill(self, messages):
        logits = np.zeros((len(messages), VOCABULARY), np.float32)
        for row, conversation in enumerate(messages):
            logits[row, YES] = self._digest(conversation, "logits")[0] / 64
            logits[row, NO] = 2.0
        return None, SimpleNamespace(combined=logits)
