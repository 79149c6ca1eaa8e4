"""Readers of the files of a checkpoint folder: weights, configurations, adapters."""

import dataclasses
import functools
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from hypothesis import strategies as st

from lvlm_jax import methods, models, weights
from lvlm_jax.generation import defaults
from lvlm_jax.generation.settings import GREEDY, Decoding
from lvlm_jax.journal.record import method_record
from lvlm_jax.methods import fitted, learned
from lvlm_jax.weights import checkpoint, peft_settings
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile
from tests.fuzz import generators as make
from tests.fuzz.engine import Reader, Wrong, same, used
from tests.fuzz.questions import made
from tests.models.families import FAMILIES
from tests.weights import checkpoints as tiny

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.arange(4, dtype=np.float16)}
TENSORS |= {"empty": np.zeros((0, 3), np.int64), "one": np.array(3.0, np.float64)}


def safetensors_file(files: make.Files, folder: Path) -> None:
    """The library safetensors reads every accepted file with the same result."""
    make.write(files, folder)
    path = folder / "model.safetensors"
    file = SafetensorsFile(path)
    try:
        theirs = safetensors.numpy.load(path.read_bytes())
    except Exception as error:
        raise Wrong(f"safetensors refuses it: {error}") from error
    same(set(file.shapes), set(theirs), "names")
    for name, array in theirs.items():
        view = file.view(name)
        same((view.dtype, view.shape, view.tobytes()), (array.dtype, array.shape, array.tobytes()), name)
        file.release(name)


def torch_bytes(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@st.composite
def torch_files(draw) -> make.Files:
    kinds = st.sampled_from(
        (
            torch.ones(2, 3), torch.ones(2).to(torch.bfloat16), torch.ones(2).to(torch.float8_e5m2),
            torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.tensor(True), torch.tensor(3),
            torch.nn.Parameter(torch.ones(3)), torch.ones(4, 4).t(), torch.ones(4).expand(3, 4), torch.zeros(0),
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), torch.zeros(1, device="meta"),
        )
    )  # fmt: skip
    value = draw(make.changed({"a": draw(kinds), "b": draw(kinds)}, kinds | make.json_values))
    try:
        content = torch_bytes(value)
    except Exception:  # a value that torch does not write
        content = b""
    return {"x.bin": draw(st.just(content) | make.damaged(content))}


def bin_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    file = BinFile(folder / "x.bin")
    theirs = torch.load(folder / "x.bin", weights_only=True, map_location="cpu")
    for name, tensor in theirs.items():
        view = file.view(name)
        same((view.shape, view.astype(np.complex128).tolist()),
             (tuple(tensor.shape), tensor.detach().to(torch.complex128).tolist()), name)  # fmt: skip


@functools.cache
def raw_configs() -> dict[str, dict]:
    found = {name: json.loads(json.dumps(family.raw(), default=str)) for name, family in FAMILIES.items()}
    original = tiny.original_config("openai/clip-vit-large-patch14-336", 96) | {"mm_hidden_size": 1024}
    return found | {"original": original}


def config_cases() -> st.SearchStrategy[make.Files]:
    written = {name: json.dumps(raw).encode() for name, raw in raw_configs().items()}
    return st.sampled_from(tuple(written)).flatmap(lambda name: make.changed_folder({"config.json": written[name]}))


def configuration(files: make.Files, folder: Path) -> models.FamilyConfig:
    make.write(files, folder)
    config = weights.model_config(folder)
    used(hash(config), models.build(config), config.blank())
    for token in (*config.eos_token_ids, config.pad_token_id, config.image_token_id):
        np.int32(token)
    return config


def parameters(files: make.Files, folder: Path) -> None:
    """Parameters can be derived from an accepted configuration."""
    models.abstract_parameters(configuration(files, folder))


GENERATION = {
    "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05,
    "eos_token_id": [2, 3], "pad_token_id": 0, "bos_token_id": 1, "max_new_tokens": 20, "num_beams": 1,
    "length_penalty": 1.0, "min_p": None, "bad_words_ids": None, "transformers_version": "5.0",
}  # fmt: skip


def generation_config(files: make.Files, folder: Path) -> None:
    make.write({"config.json": json.dumps(raw_configs()["llava"]).encode(), **files}, folder)
    found = defaults.with_defaults(GREEDY, "checkpoint", folder)
    given = json.loads(files[defaults.FILE]) if isinstance(files[defaults.FILE], bytes) else {}
    if given.get("do_sample") is True and given.get("temperature") is not None:
        same(found.temperature, float(given["temperature"]), "temperature")
    used(Decoding(**vars(found)).sampling)
    config = weights.model_config(folder)
    found.stops(config)
    given = given.get("eos_token_id")
    if isinstance(given, list):
        same(list(config.eos_token_ids), given, "eos_token_id")


ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none",
    "target_modules": ["q_proj", "v_proj"], "exclude_modules": None, "layers_to_transform": [0, 1],
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers\.0\..*": 8}, "use_rslora": False, "inference_mode": True,
    "init_lora_weights": True, "fan_in_fan_out": False, "base_model_name_or_path": "x/y",
}  # fmt: skip
PATTERNS = ("(a+)+$", "(" * 500, "[", "(?:.*.*)*x", r".*\.q_proj", "(?P<a>x)(?P=a)", "x{1000000000}", "a|" * 2000)


@st.composite
def adapter_configs(draw) -> make.Files:
    values = make.json_values | st.sampled_from(PATTERNS)
    content = make.written_json(draw(make.changed(ADAPTER, values, most=3))).encode()
    return {peft_settings.CONFIG: draw(st.just(content) | st.just(content) | make.damaged(content))}


def adapter_config(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    settings = peft_settings.read_settings(folder)
    for layer in range(2):
        for name in ("q_proj", "down_proj"):
            module = f"model.layers.{layer}.self_attn.{name}"
            if settings["target_modules"] is not None and peft_settings.is_targeted(module, settings):
                rank, scale = peft_settings.rank(module, settings), peft_settings.scale(module, settings)
                same((type(rank), scale > 0, np.isfinite(np.float32(scale))), (int, True, True), f"{rank}, {scale}")


def shards(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    for file in checkpoint.open_files(checkpoint.weight_files(folder)):
        for name in file.shapes:
            file.view(name).sum()


def fitted_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    found = fitted.read(folder / "f.safetensors")
    for name, array in found.arrays.items():
        same(array.shape, safetensors.numpy.load(files["f.safetensors"])[name].shape, name)
    json.dumps(found.record())


@functools.cache
def fitted_files() -> make.Files:
    source = fitted.Source(**{field.name: "x" for field in dataclasses.fields(fitted.Source)})
    arrays = {name: TENSORS[name] for name in ("a", "b.c")}
    return made(lambda folder: fitted.write(folder / "f.safetensors", fitted.Fitted(arrays, source)))


@functools.cache
def learned_files() -> make.Files:
    source = fitted.Source("learned", "x", "x", "{}")
    directions = fitted.Fitted({"directions": np.ones((2, 4), np.float32)}, fitted.Source("vti", "x", "x", "{}"))
    members = (methods.PAI(alpha=0.4), methods.VAF(), methods.get("vti")(fitted=directions))
    return made(lambda folder: learned.write(folder / "f.safetensors", learned.Learned(members, source)))


@st.composite
def learned_cases(draw) -> make.Files:
    """The file of a learned method; in half of the cases its members, which are JSON in the metadata, are changed."""
    if draw(st.booleans()):
        return draw(make.changed_folder(learned_files()))
    content = learned_files()["f.safetensors"]
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    members = make.written_json(draw(make.changed(json.loads(metadata["members"]))))
    members = members.encode("utf-8", "replace").decode()
    return {"f.safetensors": safetensors.numpy.save(safetensors.numpy.load(content), metadata | {"members": members})}


def learned_method(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    method = learned.read(folder / "f.safetensors")
    learned.write(folder / "again.safetensors", method)
    same(learned.read(folder / "again.safetensors").label, method.label, "label")
    json.dumps(method_record(method))


INDEX = json.dumps({"metadata": {"total_size": 24}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})


def _shard_cases() -> st.SearchStrategy[make.Files]:
    parts = {f"m-{n}.safetensors": safetensors.numpy.save({name: TENSORS["a"]}) for n, name in ((1, "a"), (2, "b"))}
    return make.changed_folder({"model.safetensors.index.json": INDEX.encode(), **parts})


SAFETENSORS = {"model.safetensors": safetensors.numpy.save(TENSORS)}
SETTINGS = {defaults.FILE: json.dumps(GENERATION).encode()}
READERS = (
    Reader("safetensors", st.deferred(lambda: make.changed_folder(SAFETENSORS)), safetensors_file, 2),
    Reader("safetensors index", st.deferred(_shard_cases), shards),
    Reader("file of lvlm fit", st.deferred(lambda: make.changed_folder(fitted_files())), fitted_file, 0.5),
    Reader("learned method", learned_cases(), learned_method, 0.5),
    Reader(".bin", torch_files(), bin_file),
    Reader("config.json", st.deferred(config_cases), configuration, 2),
    Reader("parameters of a config.json", st.deferred(config_cases), parameters, 0.3),
    Reader("generation_config", st.deferred(lambda: make.changed_folder(SETTINGS)), generation_config),
    Reader("adapter_config", adapter_configs(), adapter_config),
)
