"""A tiny random model of every family with prompts for it, through the builders of the families' own tests."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlavaNextForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from lvlm_jax import LVLM
from lvlm_jax.processors import inputs
from lvlm_jax.processors.layout import Inputs
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.models import (
    grid_checkpoints,
    instructblip_checkpoints,
    internvl_checkpoints,
    qwen2_checkpoints,
    qwen_vl_checkpoints,
    test_gemma3_parity,
    test_glm4v_parity,
    test_llava_next_parity,
    test_llava_onevision_parity,
    test_qwen3_vl_parity,
    test_smolvlm_parity,
    tile_checkpoints,
)
from tests.models.tile_checkpoints import LANDSCAPE, PORTRAIT, SQUARE

Arrays = dict[str, np.ndarray]
Sampler = Callable[
    [Any, int], Arrays
]  # of a layout and a seed, what the family's processor would return for it

TEXT = 9  # tokens of a prompt without an image
PATCHES = ((3, (4, 20), 4, (8, 4), 5), (2, (4, 4), 6))  # the longest in a bucket of its own
WHOLE = ((3, IMAGE, 4, IMAGE, 5), (2, IMAGE, 6))
TILES = ((3, LANDSCAPE, 4, PORTRAIT, 5), (2, SQUARE, 6))


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's tiny model is made.

    Attributes:
        make: writes a checkpoint to a folder and returns what makes prompts.
        two, one: layouts of a prompt with two images, of different forms where they have forms, and with one, in the
            words of the family's builders.
        text: layout of a prompt without an image.
    """

    make: Callable[[Path], Sampler]
    two: Any
    one: Any
    text: Any = (TEXT,)


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


def load(name: str, folder: Path) -> Case:
    """The tiny model of a family, written to and read from a folder."""
    family = FAMILIES[name]
    sample = family.make(folder)
    model = LVLM.from_pretrained(folder, dtype="float32")
    layouts = (family.two, family.text, family.one)
    return Case(model, [sample(layout, seed) for seed, layout in enumerate(layouts)])


def _llava(folder: Path) -> Sampler:
    config = checkpoints.make_llava(folder, seed=3, text={"num_key_value_heads": 2}).config
    return lambda layout, seed: checkpoints.random_inputs(config, seed, [layout])


def _llava_next(folder: Path) -> Sampler:
    config = test_llava_next_parity.config_of()
    theirs = tile_checkpoints.make(LlavaNextForConditionalGeneration, config, folder, seed=3)
    return lambda layout, seed: tile_checkpoints.random_inputs(theirs, seed, [layout])


def _llava_onevision(folder: Path) -> Sampler:
    config = test_llava_onevision_parity.config_of()
    theirs = tile_checkpoints.make(LlavaOnevisionForConditionalGeneration, config, folder, seed=3)
    # As if each image came alone: images that come together are not cut.
    return lambda layout, seed: tile_checkpoints.random_inputs(theirs, seed, [layout])


def _instructblip(folder: Path) -> Sampler:
    config = instructblip_checkpoints.make(folder, seed=3).config
    return lambda layout, seed: instructblip_checkpoints.random_inputs(config, seed, [layout])


def _qwen_vl(folder: Path) -> Sampler:
    config = qwen_vl_checkpoints.VARIETIES["published_switches"]
    qwen_vl_checkpoints.make(folder, config, seed=3)
    return lambda layout, seed: qwen_vl_checkpoints.random_inputs(config, seed, [layout])


def _qwen2(model_type: str) -> Callable[[Path], Sampler]:
    def make(folder: Path) -> Sampler:
        return _patches(qwen2_checkpoints.make(folder, model_type, seed=3).config)

    return make


def _qwen3_vl(folder: Path) -> Sampler:
    return _patches(test_qwen3_vl_parity.make(folder)[0].config)


def _glm4v(folder: Path) -> Sampler:
    return _patches(test_glm4v_parity.make(folder)[0].config)


def _patches(config: Any) -> Sampler:
    return lambda layout, seed: grid_checkpoints.random_inputs(config, seed, [layout])


def _internvl(folder: Path) -> Sampler:
    config = internvl_checkpoints.build(folder, 3).config
    return lambda layout, seed: internvl_checkpoints.random_inputs(config, seed, [layout])


def _internvl_chat(folder: Path) -> Sampler:
    theirs = internvl_checkpoints.build(None, 3, text={"model_type": "llama"})
    internvl_checkpoints.write_chat(folder, theirs, internlm2=True)
    return lambda layout, seed: internvl_checkpoints.random_inputs(theirs.config, seed, [layout])


def _gemma3(folder: Path) -> Sampler:
    # A window that ends inside an image: narrower ones would hide images from the rows behind them.
    config = test_gemma3_parity.build(folder, 3, text={"sliding_window": 24}).config
    return lambda layout, seed: test_gemma3_parity.random_inputs(config, seed, [layout])


def _smolvlm(kind: str) -> Callable[[Path], Sampler]:
    def make(folder: Path) -> Sampler:
        config = test_smolvlm_parity.build(kind, folder, 3, **test_smolvlm_parity.VARIETIES[kind]).config
        return lambda layout, seed: test_smolvlm_parity.random_inputs(config, seed, [layout])

    return make


_CUT = ((3, (0, 0), 4, (1, 2), 5), (2, (2, 1), 6))  # a picture that is not cut, and pictures that are
_COUNTED = ((3, (2,), 4, (1,), 5), (2, (3,), 6))  # tiles of each image

# Model type -> how its tiny model is made; OpenGVLab's layout of InternVL besides.
FAMILIES: dict[str, Family] = {
    "gemma3": Family(_gemma3, *WHOLE),
    "glm4v": Family(_glm4v, *PATCHES),
    "idefics3": Family(_smolvlm("idefics3"), *_CUT),
    "instructblip": Family(_instructblip, two=(2, 7), one=(1, 6), text=(0, TEXT)),
    "internvl": Family(_internvl, *_COUNTED),
    "internvl_chat": Family(_internvl_chat, *_COUNTED),
    "llava": Family(_llava, *WHOLE),
    "llava_next": Family(_llava_next, *TILES),
    "llava_onevision": Family(_llava_onevision, *TILES),
    "qwen2_5_vl": Family(_qwen2("qwen2_5_vl"), *PATCHES),
    "qwen2_vl": Family(_qwen2("qwen2_vl"), *PATCHES),
    "qwen3_vl": Family(_qwen3_vl, *PATCHES),
    "qwen_vl": Family(_qwen_vl, *WHOLE),
    "smolvlm": Family(_smolvlm("smolvlm"), *_CUT),
}
