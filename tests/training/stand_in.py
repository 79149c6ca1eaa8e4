"""A stand-in for a model that answers prompts, and prompts for it."""

from PIL import Image

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import Output
from lvlm_jax.training.data.pairs import Plan, Side
from lvlm_jax.training.data.prompts import Prompt

PLAN = Plan(Side(methods.CAPL(rho=0.9)), Side(methods.CAPL(mode="truncated")), max_new_tokens=7, seed=5)


class StandIn:
    """Says back how and what it was asked; refuses a prompt that holds "too long".

    Attributes:
        batches: the texts of each batch that was prepared.
        calls: keyword arguments of each call of `generate`.
        killed_at: number of the call of `generate` that a kill ends, counted from 0.
        rejected: how answers under truncated attention begin.
    """

    def __init__(self, killed_at: int | None = None):
        self.batches, self.calls, self.killed_at = [], [], killed_at
        self.rejected = "truncated"

    def prepare(self, conversations):
        texts = [
            " ".join(part["text"] for part in conversation[-1]["content"] if part["type"] == "text")
            for conversation in conversations
        ]
        if any("too long" in text for text in texts):
            raise LVLMError("the prompt has 99 tokens, the context is 9")
        self.batches.append(texts)
        return texts

    def generate(self, texts, **options):
        if len(self.calls) == self.killed_at:
            raise KeyboardInterrupt
        self.calls.append(options)
        mode = options["method"].mode if options["method"] else "plain"
        mode = self.rejected if mode == "truncated" else mode
        said = [
            f" {mode} {text}" + (f" {seed}" if options["temperature"] else "")
            for text, seed in zip(texts, options["seed"], strict=True)
        ]
        reasons = ["length" if "endless" in text else "stop" for text in texts]
        tokens = [list(range(len(text.split()))) for text in said]
        return Output(said, tokens, [[0.0] * len(row) for row in tokens], reasons)


def prompt(folder, name, text=None, images=1, **extra):
    """A prompt with pictures of its own."""
    paths = []
    for place in range(images):
        paths.append(folder / f"{name}_{place}.png")
        Image.new("RGB", (4, 4)).save(paths[-1])
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": text or f"What is {name}?"}]
    return Prompt(tuple(paths), [{"role": "user", "content": parts}], name, extra)
