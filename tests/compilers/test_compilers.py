"""The library's programs according to the compilers of TPUs and GPUs, without a device: memory, gathers, sums."""

import math
import re
import sys
from pathlib import Path

import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.planning import compilers, plan
from tests.compiler import optimised

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
    ("pictures", "most"),
    list(zip(bench_compilers.PICTURES.values(), [1.5, 2.0], strict=True)),
    ids=bench_compilers.PICTURES,
)
def test_the_memory_of_a_tower_with_windows(compiler, pictures, most, request):
    if compiler == "tpu" and len(pictures) == 1:
        request.applymarker(pytest.mark.xfail(strict=True, reason="2.70 GiB by libtpu 0.0.42.1"))
    config = models.config_from_hf(bench_compilers.TOWER)
    assert bench_compilers.temporary(bench_compilers.tower(compiler, config, pictures)) < most


@pytest.mark.slow
@pytest.mark.parametrize("ways", [4, 8])
def test_a_token_on_several_devices_costs_two_sums_a_layer(compiler, ways):
    """No program gathers a table of embeddings, a weight or a cache."""
    config = bench_compilers.cut()
    text = bench_compilers.decode(compiler, (1, 1, ways), config).as_text()
    found = COLLECTIVE.findall(text)
    sizes = [shape.split("[")[1].split("]")[0] for shape, _ in found]
    assert [size for size in sizes if math.prod(map(int, re.findall(r"\d+", size))) > 40000] == []
    assert sum(kind == "all-reduce" for _, kind in found) <= 2 * config.text.num_layers + 4


@pytest.mark.slow
@pytest.mark.parametrize("ways", [1, 4])
def test_a_plan_by_the_compiler(compiler, ways):
    """For each token a device reads its share of weights and cache once, and sends two messages per layer."""
    config = bench_compilers.cut()
    text = config.text
    with optimised(True):
        of = plan.plan(plan.Job("7b", config, ways, (1, 1, ways)), compiler)
    assert of.compiler == compilers.label(compiler)
    *_, prefill, decode = of.programs
    kernels = text.num_layers * (4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size)
    head = text.hidden_size * text.vocab_size
    cache = decode.contents["cache"]
    assert cache == text.num_layers * 2 * text.hidden_size * 2 * (640 + 128) / ways
    by_hand = 2 * (kernels + head) / ways + cache
    if ways == 1:
        assert decode.moved == pytest.approx(by_hand, rel=0.1) and decode.flops == pytest.approx(by_hand, rel=0.1)
    # Without a device XLA for GPUs writes products of a quarter of a matrix down before it adds them.
    assert 0.9 * by_hand <= decode.moved <= 1.6 * by_hand
    attended = text.num_layers * 2 * 2 * text.hidden_size * 640**2 / 2
    assert prefill.flops == pytest.approx((2 * (640 * kernels + head) + attended) / ways, rel=0.1)
    assert decode.count == 0 if ways == 1 else 2 * text.num_layers <= decode.count <= 2 * text.num_layers + 5


@pytest.mark.slow
def test_heads_that_eight_devices_would_cut_are_spread_over_four(compiler):
    """Qwen2-7B has 4 key heads: two all-reduces per layer, and each device has only its part of the caches."""
    config = bench_compilers.cut(model="qwen2-7b")
    job = plan.Job("qwen2-7b", config, 8, (2, 1, 4), batch=2, images=0, prompt_tokens=600)
    with optimised(True):
        decode = plan.plan(job, compiler).programs[-1]
    text = config.text
    assert decode.contents["cache"] == 2 * 2 * 2 * 2 * text.num_kv_heads * text.head_dim * (640 + 128) / 8
    assert 4 <= decode.count <= 4 + 5


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda: ())
    for name, package in (("tpu", "libtpu"), ("cuda", "jax-cuda13-plugin")):
        with pytest.raises(LVLMError, match=f"the compiler {name!r} is not installed; pip install {package}"):
            compilers.absent_devices(name)
