"""Memory and devices of a load, each measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lvlm_jax import models
from lvlm_jax.weights.safetensors_file import DTYPES, write_safetensors
from lvlm_jax.weights.save import stored_shapes
from tests.weights import checkpoints as make

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000


def run(program: str, *arguments, devices: int = 1) -> dict:
    """The JSON that a program prints, run from the repository's root."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make.write_scheme(tmp_path_factory.mktemp("small") / "m", make.random_model(), make.HUB)


def write_large(folder: Path, dtype: str, layers: int = 4) -> Path:
    """About 300 MB of float32 (77 million parameters), or half of that; with fewer layers, 60 MB less for each."""
    hf = make.random_model().config.to_dict()
    heads = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=128, num_hidden_layers=layers)
    hf["text_config"] |= dict(vocab_size=8000, hidden_size=1024, intermediate_size=4096) | heads
    stored, random = stored_shapes(models.config_from_hf(hf)), np.random.default_rng(0)
    write_safetensors(
        make.write_config(folder, hf) / "model.safetensors",
        [(name, shape, DTYPES[dtype]) for name, shape in stored.items()],
        lambda name: random.random(stored[name], np.float32).astype(DTYPES[dtype]),
    )
    return folder


MEASURE = """
import json, sys
import jax
from lvlm_jax import models, weights

def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

def load(folder, dtype, quant):
    config = models.config_from_hf(weights.read_config(folder))
    return weights.load_parameters(folder, config, dtype, quant=quant)

found = []
for warm_up, *case in json.loads(sys.argv[1]):
    load(warm_up, *case[1:])  # everything that is imported or compiled once
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at what is resident now
    before = status("VmRSS")
    leaves = jax.tree.leaves(load(*case))
    found.append(dict(model=sum(leaf.nbytes for leaf in leaves), largest=max(leaf.size for leaf in leaves),
                      peak=status("VmHWM") - before, resident=status("VmRSS") - before))
    del leaves
print(json.dumps(found))
"""


def measured(*cases: tuple) -> list[dict]:
    """Bytes of the model, elements of its largest leaf, and by how many bytes the process grew, at most and at last.

    Args:
        cases: of a load each: a folder to load first, then the folder, dtype and precision.
    """
    return run(MEASURE, json.dumps(cases, default=str))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_model_and_one_tensor(small, tmp_path):
    # VmHWM counts every resident page, those of the mapped file included: the strictest measure there is.
    sizes = {"float32": 4, "bfloat16": 2}
    folders = {write_large(tmp_path / "f32", "F32", 2): 4, write_large(tmp_path / "f16", "F16", 2): 2}
    cases = [(folder, dtype) for folder in folders for dtype in sizes]
    results = measured(*((small, folder, dtype, None) for folder, dtype in cases))
    for (folder, dtype), found in zip(cases, results, strict=True):
        assert found["model"] > 90 * MB
        # One tensor, counted as it is in the file and as it is converted.
        tensor = found["largest"] * (folders[folder] + sizes[dtype])
        assert found["peak"] < found["model"] + tensor + 25 * MB, found
        assert found["resident"] < found["model"] + 15 * MB, found


SHARDED = """
import json, sys
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from lvlm_jax import models, weights
from lvlm_jax.weights import plan
from lvlm_jax.weights.tables import flatten, unflatten

read = []  # (elements of a tensor, elements of the slice that was read for a device)
view = plan.Source.view

class Recorder(np.ndarray):
    def __getitem__(self, index):
        piece = super().__getitem__(index)
        read.append((self.size, piece.size))
        return piece

plan.Source.view = lambda source: view(source).view(Recorder)
folder = sys.argv[1]
config = models.config_from_hf(weights.read_config(folder))
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))

def place(path, shape):
    if path.endswith("/kernel") and len(shape) == 2:
        return NamedSharding(mesh, P("fsdp", "tensor"))
    return NamedSharding(mesh, P("tensor") if path.endswith("/embedding") and shape[0] % 2 == 0 else P())

def same(params, shardings=None):
    assert params.keys() == single.keys()
    for path, leaf in params.items():
        assert shardings is None or leaf.sharding == shardings[path], path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(single[path]), err_msg=path)

for dtype in ("float32", "bfloat16"):
    single = flatten(weights.load_parameters(folder, config, dtype))
    shardings = {path: place(path, leaf.shape) for path, leaf in single.items()}
    for given in (place, unflatten(shardings)):
        read.clear()
        sharded = flatten(weights.load_parameters(folder, config, dtype, given))
        assert len(read) == 8 * len(sharded) and {whole // part for whole, part in read} == {1, 2, 8}
        same(sharded, shardings)
    everywhere = NamedSharding(mesh, P())
    same(flatten(weights.load_parameters(folder, config, dtype, everywhere)), dict.fromkeys(single, everywhere))

kernel = sharded["language_model/layers_0/mlp/up_proj/kernel"]
saved = weights.save_checkpoint(sys.argv[2], unflatten(sharded), config)
same(flatten(weights.load_parameters(saved, config)))
print(json.dumps(dict(devices=jax.device_count(), shards=len({str(shard.index) for shard in kernel.addressable_shards}),
                      shard=kernel.addressable_shards[0].data.shape, whole=kernel.shape)))
"""


def test_loading_onto_eight_devices_equals_one(small, tmp_path):
    found = run(SHARDED, small, tmp_path / "out", devices=8)
    assert found == {"devices": 8, "shards": 8, "shard": [12, 40], "whole": [48, 80]}
