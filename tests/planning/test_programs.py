"""What plans read from a compiled program, against figures worked out by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from lvlm_jax.planning import collectives, devices, double_width, hlo_text, products, scattered_sums, schedule

TEXT = Path(__file__).with_name("program.hlo").read_text()


FOUND, ENTRY = hlo_text.computations(TEXT)
RUNS = hlo_text.runs(FOUND, ENTRY)  # how often each runs


def test_products_count_in_every_round():
    assert RUNS == {"add": 1, "sliced": 1, "body": 5, "more": 5, "main": 1}
    assert products.flops(FOUND, RUNS) == 5 * 2 * (4 * 6) * 6 + 2 * (7 * 7) * (3 * 2)


def test_messages_by_their_reach():
    """A gather brings seven eighths of its result; a sum over four comes twice, three quarters of it each time."""
    found = collectives.read(FOUND, RUNS, devices=8)
    assert found == ({8: 64 * 16 * 4 * 7 / 8, 4: 2 * 8 * 16 * 4 * 3 / 4}, 2)


def test_a_sum_that_is_only_sliced_comes_in_slices():
    """The slice is of 16 numbers: each of three others sends one."""
    assert collectives.read(scattered_sums.scattered(FOUND), RUNS, devices=8).received[4] == 16 * 4 * 3
    whole = TEXT.replace("fusion(%sum, %partition-id.1)", "fusion(%sum, %sum)")  # the second one is no slice of it
    found, _ = hlo_text.computations(whole)
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
    one = hlo_text.Instruction("m", "f32[2]", "all-gather", ("p",), rest, False)
    assert collectives._group(one, 8) == group


# Two wide values that each give a narrow one: never both at once, though the text has them so.
SLICED = """
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
    assert schedule.temporaries(*hlo_text.computations(text)) == 4 * (1000 + 10 + 10)


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
