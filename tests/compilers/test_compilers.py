"""What the compilers of TPUs and GPUs say of the library's programs, without a device: memory, gathers, sums."""

import math
import re
import sys
from pathlib import Path

import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.planning import compilers
from tests.models.test_published import published

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
import bench_compilers  # noqa: E402

COLLECTIVE = re.compile(r"= (\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@pytest.fixture(params=compilers.NAMES)
def compiler(request):
    if request.param not in compilers.installed():
        pytest.skip(f"the compiler {request.param} is not installed")
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("name", bench_compilers.METHODS)
def test_the_memory_of_a_prompt_grows_with_its_length(compiler, name):
    near, far = (
        bench_compilers.temporary(bench_compilers.compiled(compiler, length, 1, bench_compilers.METHODS[name]()))
        for length in (4096, 16384)
    )
    assert far <= 2 * 4 * near and far < 8


@pytest.mark.slow
def test_the_memory_of_an_update_grows_with_its_length(compiler):
    near, far = (bench_compilers.temporary(bench_compilers.update(compiler, length)) for length in (1024, 4096))
    assert far <= 2 * 4 * near


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sides", "most"), [([(3584, 3584)], 1.5), ([(1024, 1024)] * 16, 2.0)], ids=["one large picture", "sixteen"]
)
def test_the_memory_of_a_tower_with_windows(compiler, sides, most):
    raw = published("qwen2_5_vl", "Qwen2.5-VL-7B-Instruct")
    vision = raw["vision_config"] | {"depth": 4, "fullatt_block_indexes": [1, 3]}
    config = models.config_from_hf(raw | {"vision_config": vision})
    assert bench_compilers.temporary(bench_compilers.tower(compiler, config, sides)) < most


@pytest.mark.slow
@pytest.mark.parametrize("ways", [4, 8])
def test_a_token_on_several_devices_costs_two_sums_a_layer(compiler, ways):
    """And no gather of a table of embeddings, of a weight or of a cache."""
    config = bench_compilers.cut()
    text = bench_compilers.decode(compiler, (1, 1, ways), config).as_text()
    found = COLLECTIVE.findall(text)
    sizes = [shape.split("[")[1].split("]")[0] for shape, _ in found]
    assert [size for size in sizes if math.prod(map(int, re.findall(r"\d+", size))) > 40000] == []
    assert sum(kind == "all-reduce" for _, kind in found) <= 2 * config.text.num_layers + 4


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda: ())
    for name, package in (("tpu", "libtpu"), ("cuda", "jax-cuda13-plugin")):
        with pytest.raises(LVLMError, match=f"the compiler {name!r} is not installed; pip install {package}"):
            compilers.absent_devices(name)
