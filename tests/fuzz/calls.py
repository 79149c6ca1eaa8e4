"""Readers of settings: the arguments of every call of `LVLM`, methods, and the words that name methods."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from hypothesis import strategies as st

from lvlm_jax import LVLM, parallel
from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import grid
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.journal.record import method_record
from lvlm_jax.methods import chain, parse, registry
from tests.fuzz import generators as make
from tests.fuzz.engine import Reader, Wrong, same, used
from tests.fuzz.pictures import ADDRESS, PNG, TALK, images, small_processor, with_pictures


class Reached(BaseException):
    """Raised when a case has reached the model's computation."""


def _reached(*_: Any, **__: Any) -> None:
    raise Reached


COMPUTES = ("encode_images", "embed", "prefill", "full_forward", "tapped_forward", "contrast_pixels", "decode_step")


@contextmanager
def not_computing() -> Iterator[None]:
    """Nothing is compiled: a call that would begin to compute is accepted."""
    with mock.patch.multiple(decode_loop, **dict.fromkeys(COMPUTES, _reached)):
        try:
            yield
        except Reached:
            pass


def model() -> LVLM:
    """A model without parameters."""
    processor, config = small_processor()
    made = LVLM({}, config)
    made.processor = processor
    return made


GOOD = {
    "max_new_tokens": (1, 7), "temperature": (0.0, 0.5), "top_k": (0, 5), "top_p": (1.0, 0.9), "seed": (0, (1,)),
    "repetition_penalty": (1.0, 1.5), "stop": ((), "x", ["a"]), "stop_token_ids": (None, (1, 2)), "num_beams": (1, 2),
    "length_penalty": (1.0, 2.0),
}  # fmt: skip


@st.composite
def settings(draw, names: tuple[str, ...] = tuple(GOOD), most: int = 3) -> dict[str, Any]:
    """Keywords, some of them valid."""
    chosen = draw(st.lists(st.sampled_from(names), unique=True, max_size=most))
    good = {name: st.sampled_from(GOOD.get(name, (None,))) for name in chosen}
    return {name: draw(make.either(good[name], make.any_values)) for name in chosen}


def decoding(given: dict[str, Any], folder: Path) -> None:
    """The accepted value equals the given one and fits on a device."""
    made = Decoding(**given)
    for name, value in given.items():
        ours = getattr(made, name)
        if isinstance(ours, int | float):
            number = value.item() if getattr(value, "ndim", None) == 0 else value
            same((float(ours), isinstance(value, bool | np.bool_)), (float(number), False), name)
            if not math.isfinite(np.float32(ours)) or (ours and not np.float32(ours)):
                raise Wrong(f"{name} {ours} is {np.float32(ours)} in float32")
    sampling = made.sampling
    np.asarray(made.seed if isinstance(made.seed, tuple) else [made.seed], np.uint32)
    for leaf in jax.tree.leaves(sampling):
        np.asarray(leaf)


CALLS = {
    "generate": (*GOOD, "method", "messages", "generation_config"),
    "generate_many": ("max_new_tokens", "temperature", "top_k", "stop", "batch_size", "method", "requests"),
    "stream": ("max_new_tokens", "temperature", "seed", "stop", "method", "messages"),
    "sweep": ("max_new_tokens", "temperature", "seed", "methods", "messages"),
    "prefill": ("method", "max_length", "prompt", "tap"),
    "logits": ("method", "prompt"),
    "read": ("method", "prompt", "tap"),
    "attention": ("method", "tokens", "messages"),
    "encode_images": ("images",),
}
METHODS = ("none", "cmac", "vcd", "icd", "sid", "opera", "eah+cmac", "cmac:alpha=1")
Q = with_pictures(TALK[1:2])
NEEDED = {
    "generate": {"messages": Q}, "generate_many": {"requests": [(Q, 1)]}, "stream": {"messages": Q},
    "sweep": {"messages": Q, "methods": ["cmac", "cmac:alpha=2"]}, "prefill": {"prompt": Q}, "logits": {"prompt": Q},
    "read": {"prompt": Q, "tap": None}, "attention": {"messages": Q, "tokens": [[1, 2]]},
    "encode_images": {"images": [PNG]},
}  # fmt: skip


@st.composite
def calls(draw) -> tuple[str, dict[str, Any]]:
    """A call and its keywords."""
    name = draw(st.sampled_from(tuple(CALLS)))
    given = NEEDED[name] | draw(settings(CALLS[name], most=2))
    if draw(st.integers(0, 2)) == 0 and "method" in CALLS[name]:
        given["method"] = draw(st.sampled_from(METHODS))
    return name, given


def call(case: tuple[str, dict[str, Any]], folder: Path) -> None:
    name, given = case
    with not_computing():
        found = getattr(model(), name)(**given)
        if name in ("stream", "generate_many"):
            for piece in found:
                if isinstance(piece, tuple) and isinstance(piece[1], LVLMError):
                    raise piece[1]


LOADING = ("path_or_hub_id", "dtype", "mesh", "vision_tower", "adapter", "quant", "generation_config")


def loading(given: dict[str, Any], folder: Path) -> None:
    with mock.patch("lvlm_jax.weights.load_parameters", _reached), mock.patch.dict("os.environ", HF_HUB_OFFLINE="1"):
        try:
            LVLM.from_pretrained(**{"path_or_hub_id": "pocket"} | given)
        except Reached:
            pass


@st.composite
def methods(draw) -> tuple[str, dict[str, Any]]:
    """A method and some of its fields."""
    name = draw(st.sampled_from(registry.names()))
    fields = [field for field in dataclasses.fields(registry.get(name)) if {"low", "static"} & field.metadata.keys()]
    chosen = draw(st.lists(st.sampled_from(fields), max_size=3, unique_by=lambda field: field.name)) if fields else []
    near = {field.name: make.either(make.near(field.default), make.any_values) for field in chosen}
    return name, {field: draw(values) for field, values in near.items()}


def _in_words(made: Any, name: str) -> bool:
    """Whether a field holds one number, which can be written on a command line."""
    return getattr(made, name) is not None and not isinstance(getattr(made, name), Layered)


def method(case: tuple[str, dict[str, Any]], folder: Path) -> None:
    name, given = case
    made = registry.get(name)(**given)
    for field in dataclasses.fields(made):
        if "low" in field.metadata and given.get(field.name) is not None:
            value = given[field.name]
            if isinstance(getattr(made, field.name), Layered):
                same(getattr(made, field.name).record(), np.asarray(value, np.float32).tolist(), field.name)
                continue
            same(float(getattr(made, field.name)), float(np.float32(value)), field.name)
            if not math.isfinite(getattr(made, field.name)):
                raise Wrong(f"{field.name} is {getattr(made, field.name)}")
    used(hash(jax.tree.structure(made)), made.label)
    json.dumps(method_record(made), allow_nan=False)
    used(made.branches(), made.exits(8))
    if made.search is None:
        chain(made, registry.get("cmac")())
    # What is shown of a method on the command line makes the same one.
    words = ",".join(
        f"{field.name.strip('_')}={parse.shown(getattr(made, field.name))}"
        for field in parse._fields(name)
        if _in_words(made, field.name) and field.name in given and "low" in field.metadata
    )
    again = parse.as_method(f"{name}:{words}" if words else name)
    for field in parse._fields(name):
        if field.name in given and "low" in field.metadata and _in_words(made, field.name):
            same(float(getattr(again, field.name)), float(getattr(made, field.name)), f"{field.name} in words")


EXPRESSIONS = (
    "cmac", "CMAC", "none", "cmac/llava-1.5/pope", "cmac:alpha=3,beta=0.1", "sevi/balanced:layers=8,9,kappa=0.3",
    "eah+cmac:alpha=1e+3", "vaf:start_layer=0.25,end_layer=0.5", "opera:beams=3", "x.py:Mine", "module:Class",
    "sid:keep=[1,2]", "icd:prompt=none", "clva", "vcd:seed=3,noise_step=500",
)  # fmt: skip


@st.composite
def expressions(draw) -> str:
    text = draw(st.sampled_from(EXPRESSIONS))
    for _ in range(draw(st.integers(0, 3))):
        text = draw(make.changed_text(text))
    return text


def expression(text: str, folder: Path) -> None:
    made = parse.as_method(text)
    if made is None:
        return same(text.strip().lower(), "none", "no method")
    used(hash(jax.tree.structure(made)), made.label)
    json.dumps(method_record(made), allow_nan=False)


@st.composite
def grids(draw) -> tuple[str, list[str]]:
    known = st.sampled_from(("alpha=0,1,3", "gamma=1,2", "beta=0.1", "alpha=1e5"))
    axes = draw(st.lists(known, min_size=1, max_size=2))
    name = draw(st.sampled_from(("cmac", "vcd", "sevi")))
    return name, [draw(st.just(axis) | make.changed_text(axis)) for axis in axes]


def sweep_grid(case: tuple[str, list[str]], folder: Path) -> None:
    for point in grid.points(parse.as_method(case[0]), case[1]):
        for value in point.values():
            same(math.isfinite(value), True, "a finite point")


def mesh(given: dict[str, Any], folder: Path) -> None:
    made = parallel.make_mesh(**given)
    same(made.size, len(jax.devices()), "devices")


_ASKED = [{"type": "image_url", "image_url": {"url": ADDRESS, "detail": "auto"}}, {"type": "text", "text": "What?"}]
BODY = {
    "model": "m", "messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": _ASKED}],
    "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "n": 1, "logprobs": True, "top_logprobs": 2,
    "stream_options": {"include_usage": True}, "method": "cmac", "method_settings": {"alpha": 2.0},
}  # fmt: skip


@functools.cache
def _requests() -> Any:
    from lvlm_jax.serving import catalogue, chat, limits

    return chat.Reader(catalogue.Catalogue("m", {"careful": "cmac:alpha=3"}), limits.Limits())


def request(body: Any, folder: Path) -> None:
    """A request to the server: an error of 400 to 499 in one line, or all that an answer needs."""
    from lvlm_jax.serving.errors import ApiError

    try:
        body = json.loads(make.written_json(body))
    except (ValueError, RecursionError) as error:
        raise LVLMError(error) from error
    try:
        asked = _requests().read(body)
    except ApiError as error:
        if not 400 <= error.status < 500:
            raise
        raise LVLMError(error.message) from error
    json.dumps(method_record(asked.method), allow_nan=False)
    for decoding in asked.decodings:
        used(decoding.sampling)


READERS = (
    Reader("request to the server", make.changed(BODY, most=3), request, 1.5),
    Reader("settings", settings(), decoding, 3),
    Reader("calls", calls(), call, 3),
    Reader("loading", settings(LOADING, 2), loading),
    Reader("methods", st.deferred(methods), method, 3),
    Reader("method expressions", expressions(), expression, 2),
    Reader("grids", grids(), sweep_grid, 0.5),
    Reader("meshes", settings(("data", "fsdp", "tensor")), mesh, 0.5),
    Reader("one image of encode_images", st.fixed_dictionaries({"images": st.lists(images, max_size=2)}).map(
        lambda given: ("encode_images", given)), call, 0.5),
)  # fmt: skip
