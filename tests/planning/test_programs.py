"""What plans read from a compiled program, against figures worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from lvlm_jax.planning import collectives, devices, double_width, hlo_text, products, scattered_sums, schedule

TEXT = """HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

%sliced (param_0: f32[8,16], param_1: u32[]) -> f32[1,16] {
  %param_0 = f32[8,16]{1,0} parameter(0)
  %param_1 = u32[] parameter(1)
  %convert.1 = f64[8,16]{1,0} convert(%param_0)
  ROOT %dynamic-slice.1 = f64[1,16]{1,0} dynamic-slice(%convert.1, %param_1, %param_1), dynamic_slice_sizes={1,16}
}

%body (t: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %t = (s32[], f32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %a = f32[4,6]{1,0} get-tuple-element(%t), index=1
  %w = f32[6,6]{1,0} constant({...})
  %d = f32[4,6]{1,0} dot(%a, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %r = (s32[], f32[4,6]{1,0}) tuple(%i, %d)
}

%more (c: (s32[], f32[4,6])) -> pred[] {
  %c = (s32[], f32[4,6]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: f32[8,16], q: f32[4,6]) -> f64[1,16] {
  %p = f32[8,16]{1,0} parameter(0)
  %q = f32[4,6]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %gathered = f32[64,16]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="f"}
  %partition-id.1 = u32[] partition-id()
  %sum = f32[8,16]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %begun = (s32[], f32[4,6]{1,0}) tuple(%zero, %q)
  %loop = (s32[], f32[4,6]) while(%begun), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %kernel = f32[3,2,7]{2,1,0} constant({...})
  %row = f32[1,9,2]{2,1,0} iota(), iota_dimension=0
  %seen = f32[1,7,7]{2,1,0} convolution(%row, %kernel), window={size=3}, dim_labels=b0f_0io->b0f
  ROOT %own = f64[1,16]{1,0} fusion(%sum, %partition-id.1), kind=kLoop, calls=%sliced
}
"""


@pytest.fixture(scope="module")
def module():
    """(computations, how often each runs, the first)."""
    found, entry = hlo_text.computations(TEXT)
    return found, hlo_text.runs(found, entry), entry


def test_how_often_computations_run(module):
    assert module[1] == {"add": 1, "sliced": 1, "body": 5, "more": 5, "main": 1}


def test_products_count_in_every_round(module):
    assert products.flops(*module[:2]) == 5 * 2 * (4 * 6) * 6 + 2 * (7 * 7) * (3 * 2)


def test_messages_by_their_reach(module):
    """A gather brings seven eighths of its result; a sum over four comes twice, three quarters of it each time."""
    found = collectives.read(*module[:2], devices=8)
    assert found == ({8: 64 * 16 * 4 * 7 / 8, 4: 2 * 8 * 16 * 4 * 3 / 4}, 2)


def test_a_sum_that_is_only_sliced_comes_in_slices(module):
    """The slice is of 16 numbers: each of three others sends one."""
    found = scattered_sums.scattered(module[0])
    assert collectives.read(found, module[1], devices=8).received[4] == 16 * 4 * 3
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


def test_an_order_that_holds_little():
    """Two wide values that each give a narrow one: never both at once, though the text has them so."""
    text = """HloModule m

ENTRY %main (p: f32[]) -> f32[10] {
  %a = f32[1000]{0} iota(), iota_dimension=0
  %b = f32[1000]{0} iota(), iota_dimension=0
  %c = f32[10]{0} slice(%a), slice={[0:10]}
  %d = f32[10]{0} slice(%b), slice={[0:10]}
  ROOT %e = f32[10]{0} add(%c, %d)
}
"""
    assert schedule.temporaries(*hlo_text.computations(text)) == 4 * (10 + 1000 + 10)


def test_what_is_made_of_arguments_is_made_when_it_is_needed():
    """Two gathered weights, used one after the other: one of them is held at a time."""
    text = """HloModule m

ENTRY %main (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %v = f32[1000]{0} all-gather(%p), replica_groups=[1,100]<=[100], dimensions={0}
  %w = f32[1000]{0} all-gather(%p), replica_groups=[1,100]<=[100], dimensions={0}
  %x = f32[10]{0} iota(), iota_dimension=0
  %y = f32[10]{0} custom-call(%x, %v), custom_call_target="product"
  ROOT %z = f32[10]{0} custom-call(%y, %w), custom_call_target="product"
}
"""
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
