"""Makes a checkpoint of random weights from the small files of a published one, with its sizes, names and dtypes.

    python tools/random_checkpoint.py FILES OUT
    python tools/random_checkpoint.py FILES OUT --layers 4

FILES has the configuration and the processor of a checkpoint, but no weights. `lvlm verify OUT` then checks whether
all tensors fit and the answers equal transformers'. The weights are spread widely enough that attention is not flat and
tokens differ.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401 - NumPy knows bfloat16 by it
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import model_config
from lvlm_jax.weights.safetensors_file import write_safetensors
from lvlm_jax.weights.save import stored_shapes

INDEXES = "*.index.json"


def values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random values of a tensor, scaled by its kind."""
    drawn = np.random.default_rng([seed, *name.encode()]).standard_normal(shape, np.float32)
    fan_in = math.prod(shape[1:])
    if len(shape) == 1:
        if name.endswith("bias"):
            return 0.1 * drawn
        # Scales of the decoder's last norm get random signs: with tied embeddings, a token would else predict itself.
        last = name.endswith(("text_model.norm.weight", "model.norm.weight"))
        return np.sign(drawn) if last else 1 + 0.1 * drawn
    if "embed" in name:
        return 0.4 * drawn
    return drawn * (1.4 if any(part in name for part in ("q_proj", "k_proj")) else 1) / fan_in**0.5


def cut(config: dict, layers: int) -> dict:
    """A configuration with fewer decoder layers."""
    number = {"num_hidden_layers": layers}
    return config | ({"text_config": config["text_config"] | number} if "text_config" in config else number)


def make(files: Path, out: Path, layers: int | None = None, seed: int = 0) -> int:
    """Writes the checkpoint and returns the bytes of its weights.

    Raises:
        LVLMError: a file cannot be read, or `out` exists.
    """
    if out.exists():
        raise LVLMError(f"{out} is there already; name a new folder")
    shutil.copytree(files, out, ignore=shutil.ignore_patterns(INDEXES), copy_function=shutil.copyfile)
    out.chmod(0o755)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if layers is not None:
        path.write_text(json.dumps(cut(config, layers), indent=2), encoding="utf-8")
    dtype = np.dtype(config.get("torch_dtype") or config.get("dtype") or "float32")
    shapes = stored_shapes(model_config(out))
    index = next(iter(files.glob(INDEXES)), None)
    if index is not None and (stray := shapes.keys() - json.loads(index.read_text())["weight_map"].keys()):
        raise LVLMError(f"{index} does not know {sorted(stray)[0]}")
    write_safetensors(
        out / "model.safetensors",
        [(name, shape, dtype) for name, shape in shapes.items()],
        lambda name: values(name, shapes[name], seed).astype(dtype),
    )
    return (out / "model.safetensors").stat().st_size


def main() -> None:
    """Makes the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, help="folder of published files")
    parser.add_argument("out", type=Path, help="the new folder")
    parser.add_argument("--layers", type=int, metavar="N", help="decoder layers to keep (default all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weights (default 0)")
    flags = parser.parse_args()
    try:
        size = make(flags.files, flags.out, flags.layers, flags.seed)
    except LVLMError as error:
        parser.error(str(error))
    print(f"{flags.out}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
