"""Products of few rows against the same in float64, and when they are ours and when XLA's."""

import functools
import os
import pathlib
import re
import shlex
import subprocess
from concurrent import futures

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import native
from lvlm_jax.errors import LVLMError
from lvlm_jax.models import layers
from lvlm_jax.native import build
from tests.parallel.simulated import in_a_process

# Less than a vector, no whole number of vectors, several pieces of memory in both directions.
SHAPES = [(5, 3), (64, 48), (130, 1031), (301, 2070), (700, 33)]
BY_XLA = {False: layers._exact, True: layers._exact_transposed}

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler on this machine")


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ours(x, matrix, out_first=False):
    return native.few_rows_dot(x, matrix, out_first, BY_XLA[out_first])


def calls(function, *arguments):
    """How often the compiled program calls the library."""
    return jax.jit(function).lower(*arguments).compile().as_text().count(build.TARGET)


@needs_compiler
def test_this_machine_can_build_it():
    assert native.available()
    assert calls(ours, jnp.ones((1, 64)), jnp.ones((64, 48))) == 1


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, native.FEW_ROWS, 9, 13, 25, native.SOME_ROWS])
def test_products_of_float32(shape, rows, out_first):
    x, matrix = random((rows, shape[0]), 1), random(shape, 2)
    expected = np.float64(x) @ np.float64(matrix)
    got = ours(jnp.asarray(x), jnp.asarray(matrix.T if out_first else matrix), out_first)
    np.testing.assert_allclose(got, expected, rtol=0, atol=4e-6 * np.sqrt(shape[0]))


def test_a_wide_matrix():
    """Pieces of a wide matrix have more rows than those of a narrow one."""
    x, matrix = random((2, 300), 17), random((300, 40_001), 18)
    got = ours(jnp.asarray(x), jnp.asarray(matrix))
    np.testing.assert_allclose(got, np.float64(x) @ np.float64(matrix), rtol=0, atol=7e-5)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
def test_products_with_int8(rows, out_first):
    x, matrix = (random((rows, 150), 3), np.random.default_rng(4).integers(-127, 128, (150, 1040)).astype(np.int8))
    by_xla = _int8_transposed if out_first else _int8
    got = native.few_rows_dot(jnp.asarray(x), jnp.asarray(matrix.T if out_first else matrix), out_first, by_xla)
    np.testing.assert_allclose(got, np.float64(x) @ matrix, rtol=0, atol=2e-3)


def _int8(x, matrix):
    return layers._exact(x, matrix.astype(jnp.float32))


def _int8_transposed(x, matrix):
    return _int8(x, matrix.T)


@needs_compiler
@pytest.mark.parametrize("out_first", [False, True])
def test_a_row_is_the_same_in_any_company(out_first):
    """Bit-equal, even beside rows of NaN."""
    x, matrix = (jnp.asarray(random((8, 300), 5)), jnp.asarray(random((2070, 300) if out_first else (300, 2070), 6)))
    together = jax.jit(functools.partial(ours, out_first=out_first))
    for row in range(8):
        spoilt = jnp.full_like(x, jnp.nan).at[row].set(x[row])
        alone = together(x[row][None], matrix)[0]
        np.testing.assert_array_equal(alone, together(x, matrix)[row])
        np.testing.assert_array_equal(alone, together(spoilt, matrix)[row])
        np.testing.assert_array_equal(alone, together(x[row : row + 3], matrix)[0])


@needs_compiler
def test_some_rows_are_multiplied_as_exactly_as_few():
    """XLA adds all channels one after another. And a row is bit-equal whatever the other rows are."""
    x, matrix = jnp.asarray(random((37, 1536), 25)), jnp.asarray(random((1536, 300), 26))
    exact = np.float64(x) @ np.float64(matrix)
    got, by_xla = jax.jit(ours)(x, matrix), layers._exact(x, matrix)
    assert np.square(got - exact).mean() ** 0.5 < 0.6 * np.square(by_xla - exact).mean() ** 0.5
    for first, count in ((0, 9), (20, 12), (5, 32)):
        spoilt = jnp.full_like(x, jnp.nan).at[first : first + count].set(x[first : first + count])
        for company in (x[first : first + count], spoilt[first:]):
            np.testing.assert_array_equal(ours(company, matrix)[:count], got[first : first + count])


def test_leading_axes_are_rows():
    x, matrix = jnp.asarray(random((2, 3, 1, 64), 7)), jnp.asarray(random((64, 48), 8))
    assert calls(ours, x, matrix) == native.available()
    np.testing.assert_allclose(jax.jit(ours)(x, matrix), layers._exact(x, matrix), rtol=0, atol=1e-5)
    assert ours(x[0, 0, 0], matrix).shape == (48,)


def test_many_rows_and_other_kinds_are_left_to_xla():
    matrix = jnp.ones((64, 48))
    assert calls(ours, jnp.ones((native.SOME_ROWS + 1, 64)), matrix) == 0
    assert calls(functools.partial(ours, out_first=True), jnp.ones((native.FEW_ROWS + 1, 64)), matrix.T) == 0
    assert calls(ours, jnp.ones((2, 64), jnp.int32), matrix) == 0


def test_sizes_of_zero_give_zeros():
    assert ours(jnp.ones((0, 64)), jnp.ones((64, 48))).shape == (0, 48)
    for out_first, shape in ((False, (0, 4)), (True, (4, 0))):
        np.testing.assert_array_equal(ours(jnp.ones((1, 0)), jnp.ones(shape), out_first), np.zeros((1, 4)))
    assert ours(jnp.ones((1, 3)), jnp.ones((3, 0))).shape == (1, 0)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5,), (1, 5, 6)], ids=str)
def test_sizes_that_do_not_agree_are_refused(shape, out_first):
    with pytest.raises(LVLMError, match=r"rows \[1, 5\] cannot be multiplied with a matrix"):
        ours(jnp.ones((1, 5)), jnp.ones(shape), out_first)


@needs_compiler
def test_the_library_itself_compares_sizes():
    assert native.available()
    call = jax.ffi.ffi_call(build.TARGET, jax.ShapeDtypeStruct((1, 6), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="sizes of rows, matrix and result"):
        call(jnp.ones((1, 5)), jnp.ones((4, 6)), out_first=False).block_until_ready()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, native.FEW_ROWS, 21])
def test_products_of_16_bits(shape, rows, out_first, dtype):
    """Sums are float32; the result is rounded once."""
    x, matrix = jnp.asarray(random((rows, shape[0]), 21), dtype), jnp.asarray(random(shape, 22), dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)
    got = ours(x, matrix.T if out_first else matrix, out_first)
    assert got.dtype == x.dtype
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=step, atol=4e-6 * np.sqrt(shape[0]))


@needs_compiler
def test_every_float16_number_is_read_as_it_is():
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    matrix = jnp.asarray(numbers[None])  # [1, N]: each product is one number
    got = jax.jit(functools.partial(native.few_rows_dot, out_first=False, otherwise=layers._exact))(
        jnp.ones((1, 1)), matrix
    )
    np.testing.assert_array_equal(got[0], numbers.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_are_given_a_product(platform, rows, dtype):
    traced = jax.jit(ours).trace(jnp.ones((rows, 64), dtype), jnp.ones((64, 48), dtype))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.dot_general") == 1 and "custom_call" not in text


@pytest.mark.parametrize("out_first", [False, True])
def test_derivatives_are_those_of_the_product(out_first):
    x, matrix = jnp.asarray(random((3, 40), 9)), jnp.asarray(random((48, 40) if out_first else (40, 48), 10))

    def of(product):
        def value(x, matrix):
            return jnp.sin(product(x, matrix)).sum()

        tangents = jnp.cos(x), jnp.sin(matrix)
        return jax.grad(value, (0, 1))(x, matrix), jax.jvp(value, (x, matrix), tangents)[1]

    got, expected = of(functools.partial(ours, out_first=out_first)), of(BY_XLA[out_first])
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_batch_of_rows_is_more_rows():
    xs, matrix = jnp.asarray(random((2, 3, 64), 11)), jnp.asarray(random((64, 48), 12))
    for axis in (0, 1):
        batched = jax.vmap(ours, (axis, None), axis)
        assert calls(batched, xs, matrix) == native.available()
        np.testing.assert_allclose(batched(xs, matrix), layers._exact(xs, matrix), rtol=0, atol=1e-5)
    assert calls(jax.vmap(ours, (0, None)), jnp.ones((native.SOME_ROWS + 1, 1, 64)), matrix) == 0
    matrices = jnp.stack([matrix, 2 * matrix])
    np.testing.assert_allclose(jax.vmap(ours)(xs, matrices)[1], 2 * layers._exact(xs[1], matrix), atol=2e-5)
    gradients = jax.vmap(jax.grad(lambda x, matrix: jnp.sin(ours(x, matrix)).sum()), (0, None))(xs, matrix)
    np.testing.assert_allclose(gradients, jnp.cos(layers._exact(xs, matrix)) @ matrix.T, rtol=0, atol=1e-4)


def test_several_devices_share_a_product():
    (told,) = in_a_process("parallel.few_rows_on_devices", count=2)
    assert told["calls"] == 0 and told["error"] < 1e-5 and told["alone"] == native.available()


@needs_compiler
def test_programs_that_run_at_once_do_not_meet():
    x, matrices = jnp.asarray(random((3, 300), 13)), jnp.asarray(random((6, 300, 2070), 14))
    product = jax.jit(ours)
    expected = [np.asarray(product(x, matrix)) for matrix in matrices]
    with futures.ThreadPoolExecutor(6) as pool:
        for _ in range(10):
            for got, wanted in zip(pool.map(functools.partial(product, x), matrices), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A state with no library built and no choice remembered, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.available.cache_clear()
    yield tmp_path / "lvlm_jax" / "native"
    build.available.cache_clear()


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The library as the session built it once, handed out by a stand-in for the compiler; then as `fresh`."""
    assert build.library() is not None
    folder = pathlib.Path(os.environ["XDG_CACHE_HOME"], "lvlm_jax", "native")
    built = max(folder.glob("*.so"), key=lambda file: file.stat().st_mtime)
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-dM*) exec {build.compiler()} "$@";; esac\n'
        f'for last; do :; done\ncp {shlex.quote(str(built))} "$last"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))


def test_one_variable_switches_it_off(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert not native.available() and not fresh.exists()
    x, matrix = jnp.asarray(random((2, 51), 15)), jnp.asarray(random((51, 48), 16))
    assert calls(ours, x, matrix) == 0
    np.testing.assert_array_equal(ours(x, matrix), layers._exact(x, matrix))


def test_without_a_compiler_nothing_is_said(fresh, monkeypatch, recwarn):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not native.available() and not recwarn.list


def test_a_compiler_that_fails_is_told_of_once(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such option: today' >&2; exit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="broken could not compile few_rows.cc: no such option: today; silence"):
        assert not native.available()
    assert not any(fresh.glob("*"))


@needs_compiler
def test_a_library_is_built_once(copied, fresh):
    assert build.library() is not None
    index, file = sorted(fresh.iterdir(), key=lambda path: path.suffix)
    assert re.fullmatch(r"few_rows-[0-9a-f]{16}", index.name) and file.name == f"few_rows-{index.read_text()}.so"
    before = file.stat().st_mtime_ns
    assert build.library() is not None and file.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "index"])
def test_a_damaged_library_is_built_again(copied, fresh, damage):
    assert build.library() is not None
    index, file = sorted(fresh.iterdir(), key=lambda path: path.suffix)
    whole = file.read_bytes()
    file.unlink()  # a new file: what this process has loaded stays as it is
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "index":
        file.write_bytes(whole)
        index.write_bytes(b"../\xff")
    assert build.library() is not None
    (file,) = fresh.glob("*.so")
    assert file.name == f"few_rows-{index.read_text()}.so" and len(file.read_bytes()) > len(whole) // 2


@needs_compiler
def test_a_folder_that_others_write_to_is_not_used(copied, fresh):
    fresh.mkdir(parents=True)
    fresh.parent.chmod(0o700)
    fresh.chmod(0o777)
    with pytest.warns(UserWarning, match="other users may write"):
        assert build.library() is not None
    assert not any(fresh.iterdir())


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    "sanitizer, processor",
    [("address,undefined", "-march=native"), ("address,undefined", "-march=x86-64"), ("thread", "-march=native")],
)
def test_nothing_is_read_or_written_outside_and_nothing_races(sanitizer, processor, tmp_path):
    """Compiles the whole source except XLA's call, for this processor and without its vector instructions."""
    here, program = pathlib.Path(__file__).parent, tmp_path / "program"
    options = ["-std=c++17", "-O1", "-g", "-w", "-pthread", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}"]
    folders = [f"-I{here / 'ffi'}", f"-I{pathlib.Path(build.__file__).parent}"]
    command = [build.compiler(), *options, processor, *folders, str(here / "sanitized.cc"), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and ("-fsanitize" in made.stderr or "cannot find" in made.stderr):
        pytest.skip("the compiler has no such sanitizer")
    assert made.returncode == 0, made.stderr[-2000:]
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0 failures"), done.stderr[-2000:]
