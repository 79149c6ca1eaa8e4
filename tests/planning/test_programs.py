"""Figures that plans read from a compiled program, against figures computed by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jaxlib import _hlo

from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.attention.stream import streaming_attention
from lvlm_jax.native import build
from lvlm_jax.planning import collectives, devices, double_width, hlo, products, scattered_sums, schedule, traffic

TEXT = Path(__file__).with_name("program.hlo").read_text()


def computations(text):
    return hlo.computations(_hlo.hlo_module_from_text(text))


FOUND, ENTRY = computations(TEXT)
RUNS = hlo.runs(FOUND, ENTRY)  # how often each runs


def test_products_count_in_every_round():
    assert RUNS == {"add": 1, "sliced": 1, "body": 5, "more": 5, "main": 1}
    assert hlo.round_of(FOUND, ENTRY) == "main"  # the length of its one loop is known
    assert products.flops(FOUND, RUNS) == 5 * 2 * (4 * 6) * 6 + 2 * (7 * 7) * (3 * 2)


def test_what_moves_between_memory_and_arithmetic():
    """Bytes read and written: a gather, a sum, a convolution, a fusion that takes 16 numbers, and five products."""
    gathered, summed, seen = 512 + 4096, 512 + 512, 72 + 168 + 196
    assert traffic.moved(FOUND, RUNS) == gathered + summed + seen + (128 + 4 + 128) + 5 * (96 + 144 + 96)


DECODE = """HloModule m, is_scheduled=true

%written (c: bf16[64,8], n: bf16[1,8], i: s32[]) -> bf16[64,8] {
  %c = bf16[64,8]{1,0} parameter(0)
  %n = bf16[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = bf16[64,8]{1,0} dynamic-update-slice(%c, %n, %i, %i)
}

%step (s: (s32[], bf16[64,8], bf16[1,8])) -> (s32[], bf16[64,8], bf16[1,8]) {
  %s = (s32[], bf16[64,8]{1,0}, bf16[1,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %cache = bf16[64,8]{1,0} get-tuple-element(%s), index=1
  %new = bf16[1,8]{1,0} get-tuple-element(%s), index=2
  %wrote = bf16[64,8]{1,0} fusion(%cache, %new, %j), kind=kLoop, calls=%written
  %asked = (bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%new), replica_groups={{0,1,2,3}}, dimensions={0}
  %told = bf16[4,8]{1,0} all-gather-done(%asked)
  %one = bf16[1,8]{1,0} slice(%told), slice={[0:1],[0:8]}
  ROOT %next = (s32[], bf16[64,8]{1,0}, bf16[1,8]{1,0}) tuple(%j, %wrote, %one)
}

%on (s: (s32[], bf16[64,8], bf16[1,8])) -> pred[] {
  %s = (s32[], bf16[64,8]{1,0}, bf16[1,8]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (n: s32[], c: bf16[64,8], t: bf16[1,8]) -> (s32[], bf16[64,8], bf16[1,8]) {
  %n = s32[] parameter(0)
  %c = bf16[64,8]{1,0} parameter(1)
  %t = bf16[1,8]{1,0} parameter(2)
  %laid = bf16[64,8]{1,0} copy(%c)
  %begun = (s32[], bf16[64,8]{1,0}, bf16[1,8]{1,0}) tuple(%n, %laid, %t)
  ROOT %loop = (s32[], bf16[64,8]{1,0}, bf16[1,8]{1,0}) while(%begun), condition=%on, body=%step
}
"""


def test_a_token_is_a_round_of_its_loop():
    """Work before the loop does not count; an asynchronous message counts once; the cache is written in place."""
    found, entry = computations(DECODE)
    times = hlo.runs(found, hlo.round_of(found, entry))
    assert times["step"] == 1 and times["main"] == 0
    assert collectives.read(found, times, devices=8) == ({4: 4 * 8 * 2 * 3 / 4}, 1)
    row = 8 * 2
    assert traffic.moved(found, times) == (row + row + 4) + (row + 4 * row) + 2 * row
    # The same by the call that CPUs make.
    call = f'custom-call(%cache, %new, %j), custom_call_target="{build.COLUMNS}"'
    found, _ = computations(DECODE.replace("fusion(%cache, %new, %j), kind=kLoop, calls=%written", call))
    assert traffic.moved(found, times) == 2 * row + (row + 4 * row) + 2 * row
    assert traffic.moved(found, times, only_products=True) == 0


@pytest.mark.parametrize(("rows", "causal", "window"), [(1024, True, None), (256, True, None), (1024, False, None),
                                                        (1024, True, 300)])  # fmt: skip
def test_blocks_of_streaming_attention_count_as_often_as_they_run(rows, causal, window):
    """Products are counted too, in a loop whose length is data."""
    valid = jnp.ones((1, 1024), bool)
    own = jnp.arange(1024 - rows, 1024)
    sight = LazyMask.of(own, valid, window, None) if causal else LazyMask.everywhere(rows, valid)
    first, last = sight.spans(128)
    assert sight.average_span(128) == pytest.approx(float((last - first).mean()))
    query, key = jnp.zeros((1, 2, rows, 8)), jnp.zeros((1, 2, 1024, 8))
    compiled = jax.jit(streaming_attention).lower(query, key, key, sight).compile()
    met = float((last - first).sum()) * 128 * 128
    assert products.flops_of(compiled) == pytest.approx(4 * 2 * 8 * met, rel=1e-3)


@pytest.mark.parametrize("target", [build.TARGET, build.TILES])
def test_products_in_c_count(target):
    """[3, 10] times the transpose of [20, 10]."""
    body = f"""
  %x = bf16[3,10]{{1,0}} parameter(0)
  %m = bf16[20,10]{{1,0}} parameter(1)
  ROOT %y = bf16[3,20]{{1,0}} custom-call(%x, %m), custom_call_target="{target}"
"""
    found, entry = computations(f"HloModule m\n\nENTRY %main (x: bf16[3,10]) -> bf16[3,20] {{{body}}}\n")
    assert products.flops(found, hlo.runs(found, entry)) == 2 * 3 * 20 * 10


def test_messages_by_their_reach():
    """A gather brings seven eighths of its result; a sum over four comes twice, three quarters of it each time."""
    found = collectives.read(FOUND, RUNS, devices=8)
    assert found == ({8: 64 * 16 * 4 * 7 / 8, 4: 2 * 8 * 16 * 4 * 3 / 4}, 2)


def test_a_sum_that_is_only_sliced_comes_in_slices():
    """The slice is of 16 numbers: each of three others sends one."""
    assert collectives.read(scattered_sums.scattered(FOUND), RUNS, devices=8).received[4] == 16 * 4 * 3
    whole = TEXT.replace("fusion(%sum, %partition-id.1)", "fusion(%sum, %sum)")  # the second one is no slice of it
    found, _ = computations(whole)
    assert scattered_sums.scattered(found) == found


@pytest.mark.parametrize(
    ("rest", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("source_target_pairs={{0,3},{3,0}}", [0, 3]),
        ("channel_id=1", list(range(8))),
    ],
)
def test_who_exchanges(rest, group):
    one = hlo.Instruction("m", "f32[2]", "all-gather", ("p",), rest, False)
    assert collectives._group(one, 8) == group


# Two wide values that each give a narrow one: never both at once, though the text has them so.
SLICED = """
  %p = f32[10]{0} parameter(0)
  %a = f32[1000]{0} iota(), iota_dimension=0
  %b = f32[1000]{0} iota(), iota_dimension=0
  %c = f32[10]{0} slice(%a), slice={[0:10]}
  %d = f32[10]{0} slice(%b), slice={[0:10]}
  ROOT %e = f32[10]{0} add(%c, %d)
"""
# Two weights that are gathered and used one after the other: one of them is held at a time.
GATHERED = """
  %p = f32[10]{0} parameter(0)
  %v = f32[1000]{0} all-gather(%p), replica_groups=[1,100]<=[100], dimensions={0}
  %w = f32[1000]{0} all-gather(%p), replica_groups=[1,100]<=[100], dimensions={0}
  %x = f32[10]{0} iota(), iota_dimension=0
  %y = f32[10]{0} custom-call(%x, %v), custom_call_target="product"
  ROOT %z = f32[10]{0} custom-call(%y, %w), custom_call_target="product"
"""


@pytest.mark.parametrize("body", [SLICED, GATHERED], ids=["sliced", "gathered"])
def test_an_order_that_holds_little(body):
    text = f"HloModule m\n\nENTRY %main (p: f32[10]) -> f32[10] {{{body}}}\n"
    assert schedule.temporaries(*computations(text)) == 4 * (1000 + 10 + 10)


def test_a_wider_program_computes_the_same_in_twice_the_bytes():
    def f(x, y, count):
        def add(total, row):
            return jax.lax.cond(count > 2, lambda: total + row, lambda: total * row), None

        total, _ = jax.lax.scan(add, jnp.zeros(3, jnp.float32), y)
        return jax.nn.silu(x @ x.T).astype(jnp.float32).sum() + total, count + 1

    x = jnp.asarray(np.linspace(-1, 1, 12).reshape(4, 3), jnp.bfloat16)
    y, count = jnp.ones((5, 3), jnp.float32), jnp.int32(3)
    wide = core.jaxpr_as_fun(double_width.widened(jax.make_jaxpr(f)(x, y, count)))
    expected = f(x, y, count)
    with jax.enable_x64(True):
        found = jax.jit(wide)(x.astype(jnp.float32), y.astype(jnp.float64), count)
        assert [leaf.dtype for leaf in found] == [np.float64, np.int32]
        np.testing.assert_allclose(found[0], expected[0], rtol=2e-2)
    assert found[1] == 4
    shape = double_width.shape(jax.ShapeDtypeStruct((4, 3), jnp.bfloat16))
    assert (shape.shape, shape.dtype) == ((4, 3), np.float32)


def test_a_devices_time_is_the_slower_of_memory_and_products_and_then_messages():
    one = devices.find("mine=100,10,2,5")  # GiB, GB/s, TFLOP/s, GB/s
    assert one.seconds(20e9, 1e12, "bfloat16", {}) == 2
    assert one.seconds(1e9, 4e12, "bfloat16", {8: 10e9}) == 2 + 2
    assert one.holds(92 * 2**30) and not one.holds(93 * 2**30)
    h100 = devices.find("H100")  # eight of them are joined by NVLink, more by the network
    assert h100.seconds(0, 0, "bfloat16", {8: 450e9, 16: 50e9}) == 2


def test_a_conditional_without_operands_is_counted():
    program = jax.jit(lambda once, x: jax.lax.cond(once, lambda: jnp.zeros(()), lambda: (x @ x).sum()))
    assert products.flops_of(program.lower(True, jnp.ones((8, 8))).compile()) >= 2 * 8**3
