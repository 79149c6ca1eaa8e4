"""Stand-ins of lmms-eval, VLMEvalKit and a model, and likelihoods that are computed without the adapters."""

import abc
import dataclasses
import importlib
import re
import sys
import types
from collections import namedtuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest


def of_lmms_eval():
    class lmms(abc.ABC):  # noqa: N801
        is_simple = True

        def __init__(self):
            self._rank, self._world_size, self.cache_hook, self.task_dict = 0, 1, mock.Mock(), {}

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests): ...

    def value(text):
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        try:
            return int(text) if text.isnumeric() else float(text)
        except ValueError:
            return text

    def simple_parse_args_string(text):
        parts = re.findall(r"(?:\[[^]]*\]|[^,])+", text)
        return {key: value(rest) for key, rest in (part.split("=", 1) for part in parts)}

    made = {"lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {}, "lmms_eval.api.model": {"lmms": lmms}}
    fields = ("model_id", "simple_class_path", "chat_class_path", "aliases")
    made["lmms_eval.models.registry_v2"] = {"ModelManifest": namedtuple("Manifest", fields, defaults=(None, None, ()))}
    return made | {"lmms_eval.utils": {"simple_parse_args_string": simple_parse_args_string}}


def of_vlmevalkit():
    class BaseModel:
        INTERLEAVE = False
        allowed_types = ["text", "image", "video"]

        def __init__(self):
            self.dump_image_func = None

        def generate(self, message, dataset=None):
            assert all(part["type"] in self.allowed_types for part in message)
            return self.generate_inner(message, dataset)

    return {"vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel}}


def adapter(stand_in, name):
    """A module of the adapters, imported beside stand-ins, {module: members}, and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for module, members in stand_in.items():
            patch.setitem(sys.modules, module, types.ModuleType(module))
            vars(sys.modules[module]).update(members)
        patch.delitem(sys.modules, f"lvlm_jax.integrations.{name}", raising=False)
        yield importlib.import_module(f"lvlm_jax.integrations.{name}")
        sys.modules.pop(f"lvlm_jax.integrations.{name}")


@dataclasses.dataclass
class Request:
    args: tuple


class Recording:
    """A model that answers with the number of the conversation, and keeps what it was asked."""

    def __init__(self):
        self.calls, self.count = [], 0

    def generate(self, messages, **options):
        self.calls.append((messages, options))
        numbers = range(self.count, self.count + len(messages))
        self.count += len(messages)
        return types.SimpleNamespace(text=[str(number) for number in numbers])

    def texts(self):
        """The text of each conversation, batch by batch."""
        return [[one[0]["content"][-1]["text"] for one in messages] for messages, _ in self.calls]


def independent(pocket, cases):
    """(sum, tokens, greedy) of each (pictures, text, continuation): the processor's ids, right-padded, in NumPy."""
    rows, starts, pixels = [], [], []
    for images, text, continuation in cases:
        prompt = "USER: " + "<image>\n" * len(images) + text + " ASSISTANT:"
        whole, before = (
            pocket.processor(images=images or None, text=words, return_tensors="np")
            for words in (f"{prompt} {continuation}", prompt)
        )
        rows.append(whole["input_ids"][0])
        starts.append(before["input_ids"].shape[1])
        pixels += list(whole.get("pixel_values", ()))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.arange(ids.shape[1]) < np.array([len(row) for row in rows])[:, None]
    ids[mask] = np.concatenate(rows)
    arrays = {"input_ids": ids, "attention_mask": mask, "pixel_values": np.stack(pixels)}
    found = []
    for logits, row, start in zip(np.asarray(pocket.logits(arrays), np.float64), rows, starts, strict=True):
        logits, chosen = logits[start - 1 : len(row) - 1], row[start:]
        normal = np.log(np.exp(logits).sum(axis=-1))
        total = (logits[np.arange(len(chosen)), chosen] - normal).sum()
        found.append((total, len(chosen), bool((logits.argmax(axis=-1) == chosen).all())))
    return found


class Bigrams:
    """A method's decoding in which a table of the last token gives the next logits."""

    def __init__(self, pocket):
        self.prepare = pocket.prepare
        self.table = 3 * np.random.default_rng(0).standard_normal((pocket.config.text.vocab_size,) * 2)

    def _step(self, tokens):
        return types.SimpleNamespace(combined=jnp.asarray(self.table[tokens], jnp.float32))

    def prefill(self, prompt, method, max_length):
        self.room = max_length - int(prompt.lengths.max())
        return 1, self._step(prompt.tokens[:, -1])

    def decode(self, state, tokens):
        assert state < self.room
        return state + 1, self._step(tokens)
