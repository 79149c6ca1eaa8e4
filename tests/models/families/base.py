"""How tiny random checkpoints of a family are made, and what the parity tests try on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lvlm_jax import LVLM
from tests import checkpoints
from tests.checkpoints import IMAGE, TEXT, VISION, padded

Arrays = dict[str, np.ndarray]
Layout = tuple  # of a sample: an integer stands for that many text tokens, anything else for an image

HERE = Path(__file__).parent


class Family:
    """One family: a JSON file of this folder has its tiny configuration, a Python file what is its own.

    Attributes:
        name: the `model_type` of its `config.json`, and the name of both files.
        text, vision, rest: the tiny configuration: its two parts and what is beside them.
        varieties: name -> overrides of `config`; everything is tried on the first.
        refused: pairs of a change to a `config.json` and what the error says.
        classes: transformers' configuration and model; tower: the least that the configuration of a tower says.
        layouts: name -> layouts of a batch; "padded" is text alone, one image, two images.
        two, one, words: layouts of samples with two images (of different forms where they have forms), one and none.
        word: text tokens are drawn from 3 up to it.
        new_tokens: length of greedy answers; distinct: how many different tokens the richest one has at least.
        pictures: heights and widths of what the processor is shown; counts: how many tokens they take.
        marker, chat: what the chat template writes for a picture, and around a user's words.
        refused_arrays: pairs of a change to a processor's arrays for `refused_layout` and what the error says.
    """

    classes: tuple[type, type]
    tower = VISION
    layouts: dict[str, list[Layout]] = {
        "padded": [(6,), (3, IMAGE, 5), (2, IMAGE, 4, IMAGE, 9)],
        "alone": [(4, IMAGE, 3, IMAGE, 6)],
        "text": [(11,)],
    }
    two: Layout = (3, IMAGE, 4, IMAGE, 5)
    one: Layout = (2, IMAGE, 6)
    words: Layout = (9,)
    word, new_tokens, distinct = 115, 32, 6
    pictures = (40, 24), (20, 50)
    counts: tuple[int, ...] = ()
    marker, chat = "<image>", "{}"
    refused_layout: Layout = two
    refused_arrays: list[tuple[Callable[[Arrays], dict], str]] = []

    def __init__(self, name: str):
        self.name = name
        self.__dict__ |= json.loads((HERE / f"{name}.json").read_text())
        for variety in self.varieties.values():
            variety.pop("about", None)

    def config(self, text: dict | None = None, vision: dict | None = None, **overrides: Any) -> Any:
        """A tiny configuration; `text` and `vision` override single fields of its two parts."""
        config = self.classes[0](
            text_config=TEXT | self.text | (text or {}),
            vision_config=self.tower | self.vision | (vision or {}),
            **self.rest | overrides,
        )
        config._attn_implementation = "eager"
        return config

    def raw(self) -> dict[str, Any]:
        """The `config.json` of the tiny configuration."""
        return self.config().to_dict()

    def build(self, folder: Path | None, seed: int = 11, **overrides: Any) -> Any:
        """Saves a random checkpoint (unless `folder` is None) and returns transformers' model, in float32."""
        model = self.classes[1](self.config(**overrides)).float().eval()
        checkpoints.randomize(model, seed)
        self.adjust(model)
        if folder is not None:
            model.save_pretrained(folder)
        return model

    def adjust(self, model: Any) -> None:
        """Changes random parameters that would hide mistakes."""

    def inputs(self, config: Any, seed: int, layouts: list[Layout]) -> Arrays:
        """What a processor would return for a batch drawn at random, left-padded."""
        generator = np.random.default_rng(seed)
        images = [[part for part in one if not isinstance(part, int)] for one in layouts]
        arrays = self.pixels(config, generator, images) if any(images) else {}
        marks = iter(self.placeholders(config, images, arrays))

        def tokens(part: Any) -> np.ndarray:
            return generator.integers(3, self.word, part) if isinstance(part, int) else next(marks)

        return padded([np.concatenate([tokens(part) for part in one]) for one in layouts]) | arrays

    def placeholders(self, config: Any, images: list[list], arrays: Arrays) -> list:
        """The tokens of all images."""
        return [self.image(config, part) for one in images for part in one]

    def image(self, config: Any, part: Any) -> Any:
        """The tokens of an image."""
        raise NotImplementedError

    def pixels(self, config: Any, generator: np.random.Generator, images: list[list]) -> Arrays:
        """The arrays of the images of each sample; here whole pictures."""
        side = config.vision_config.image_size
        return {"pixel_values": normal(generator, sum(map(len, images)), 3, side, side)}

    def for_us(self, inputs: Arrays, theirs: Any, ours: Any) -> Arrays:
        """The same arrays as our model takes them; the configurations of both are given."""
        return inputs

    def logits(self, theirs: Any, inputs: Arrays) -> list[np.ndarray]:
        """What transformers says at the valid tokens of each sample, `[T, V]`."""
        with torch.no_grad():
            logits = theirs(**checkpoints.to_torch(inputs)).logits.numpy()
        return [row[-count:] for row, count in zip(logits, inputs["attention_mask"].sum(axis=1), strict=True)]

    def greedy(self, theirs: Any, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """What transformers answers, `[B, new_tokens]`, and the logits that chose, `[B, new_tokens, V]`."""
        settings = dict(max_new_tokens=self.new_tokens, do_sample=False, use_cache=True)
        settings |= dict(return_dict_in_generate=True, output_logits=True)
        with torch.no_grad():
            out = theirs.generate(**checkpoints.to_torch(inputs), **settings)
        return out.sequences.numpy()[:, -self.new_tokens :], torch.stack(out.logits, dim=1).numpy()

    def check(self, theirs: Any, ours: LVLM, inputs: Arrays) -> None:
        """Further properties of a padded batch."""

    def load(self, folder: Path) -> tuple[Any, dict]:
        """A saved checkpoint loaded by transformers, and its missing and unexpected tensors."""
        settings = dict(attn_implementation="eager", output_loading_info=True)
        model, report = self.classes[1].from_pretrained(folder, **settings)
        return model.float().eval(), report

    def with_processor(self, folder: Path) -> LVLM:
        """A model with a processor beside it, whose tokens are bytes."""
        raise NotImplementedError

    def processed(self, processor: Any, pictures: list, text: str) -> Arrays:
        """What transformers' processor makes of pictures and a rendered text, with one begin token."""
        options = {"add_special_tokens": False} if text.startswith(processor.tokenizer.bos_token) else {}
        return processor(images=pictures, text=text, return_tensors="np", **options)

    def their_pixels(self, arrays: Arrays) -> np.ndarray:
        """The pixels in the arrays of transformers' processor."""
        return arrays["pixel_values"]

    def our_pixels(self, prompt: Any) -> np.ndarray:
        """The pixels in our arrays, without the padding of a bucket."""
        return prompt.pixels[prompt.owner >= 0]


def normal(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Random pixels."""
    return generator.normal(size=shape).astype(np.float32)


def merged(base: dict, change: dict) -> dict:
    """`base` updated by the fields of `change`, nested dicts included; None removes a dict."""
    out = dict(base)
    for name, value in change.items():
        if isinstance(base.get(name), dict) and value is None:
            del out[name]
        else:
            inner = isinstance(base.get(name), dict) and isinstance(value, dict)
            out[name] = merged(base[name], value) if inner else value
    return out


def byte_tokenizer(specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer without merges: single bytes, then `specials` in order; `roles` names some of them."""
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in specials])
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return PreTrainedTokenizerFast(tokenizer_object=bare, **names, extra_special_tokens=roles)


def chat_template(image: str) -> str:
    """A chat template that writes words as they are and `image` for a picture."""
    part = "{{ '" + image + "' if part['type'] == 'image' else part['text'] }}"
    parts = "{% for part in message['content'] %}" + part + "{% endfor %}"
    return "{% for message in messages %}" + parts + "{% endfor %}"
