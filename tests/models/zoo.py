"""A tiny random model of every family with prompts for it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lvlm_jax import LVLM
from lvlm_jax.processors import inputs
from lvlm_jax.processors.layout import Inputs
from tests.models import families
from tests.models.families.base import Arrays
from tests.models.families.internvl import INTERNVL_CHAT

# Model type -> how its tiny model is made; OpenGVLab's layout of InternVL besides.
FAMILIES = families.FAMILIES | {"internvl_chat": INTERNVL_CHAT}
# Gemma's window ends inside an image: narrower ones would hide images from the rows behind them.
CHANGES = {"gemma3": {"text": {"sliding_window": 24}}, "llava": {"text": {"num_key_value_heads": 2}}}


@dataclasses.dataclass(frozen=True)
class Case:
    """A loaded model and three prompts for it.

    Attributes:
        samples: what a processor would return for each prompt: two images, none, one.
    """

    model: LVLM
    samples: Sequence[Arrays]

    def prompt(self, *rows: int) -> Inputs:
        """A batch of some of the prompts; of all of them by default."""
        chosen = [self.samples[row] for row in rows or range(len(self.samples))]
        prompts = [sample["input_ids"][0] for sample in chosen]
        parts = [
            {name: array for name, array in sample.items() if name not in ("input_ids", "attention_mask")}
            for sample in chosen
        ]
        # As messages go: one prompt and one dict of arrays for each conversation.
        return inputs._lay_out(prompts, None, 0, parts, self.model.config)


def build(name: str, folder: Path | None = None) -> Any:
    """transformers' tiny model of a family, written to a folder if there is one."""
    family = FAMILIES[name]
    return family.build(folder, 3, **(next(iter(family.varieties.values())) | CHANGES.get(name, {})))


def load(name: str, folder: Path) -> Case:
    """The tiny model of a family, written to and read from a folder."""
    family = FAMILIES[name]
    config = build(name, folder).config
    layouts = (family.two, family.words, family.one)
    samples = [family.inputs(config, seed, [layout]) for seed, layout in enumerate(layouts)]
    return Case(LVLM.from_pretrained(folder, dtype="float32"), samples)
