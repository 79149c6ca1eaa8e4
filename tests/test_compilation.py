"""The compilation cache: private, switched off by one variable, and optional if it cannot be created."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import compilation


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """An empty cache folder, and JAX's settings put back afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_folder_is_private_and_given_to_jax(tmp_path):
    folder = compilation.enable_cache()
    assert folder == tmp_path / "lvlm_jax" / "xla"
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700] * 2
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert compilation.enable_cache() == folder
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))  # one chosen by the user stays
    assert compilation.enable_cache() == tmp_path / "mine"


def test_one_variable_switches_it_off(tmp_path, monkeypatch):
    for word in ("0", "off", "False"):
        monkeypatch.setenv(compilation.SWITCH, word)
        assert compilation.enable_cache() is None and jax.config.jax_compilation_cache_dir is None
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_ours_alone_is_not_used(tmp_path, monkeypatch):
    def refused(message):
        with pytest.warns(UserWarning, match=message):
            assert compilation.enable_cache() is None
        assert jax.config.jax_compilation_cache_dir is None

    ours = tmp_path / "lvlm_jax"
    (ours / "xla").mkdir(parents=True)
    ours.chmod(0o700)
    (ours / "xla").chmod(0o777)
    refused("other users may write")
    (ours / "xla").chmod(0o700)
    owner = compilation.os.getuid()
    with monkeypatch.context() as patched:
        patched.setattr(compilation.os, "getuid", lambda: owner + 1)
        refused(f"belongs to user {owner}")
    (ours / "xla").rmdir()
    ours.rmdir()
    ours.write_text("a file in the way")
    refused("not kept")


def test_programs_used_last_are_kept(monkeypatch):
    monkeypatch.setenv(compilation.LIMIT_VARIABLE, "3")
    traced = []

    def scaled(params, x, how="times", factor=1.0):
        traced.append((x.shape, how))
        return params * x * factor if how == "times" else params + x

    function = compilation.jit(scaled, static_argnames="how")

    def call(size, how="times", factor=1.0, params=2.0):
        before = len(traced)
        got = function(jnp.float32(params), jnp.ones(size), how=how, factor=factor)
        np.testing.assert_array_equal(got, np.full(size, params * factor if how == "times" else params + 1))
        return len(traced) - before

    assert [call(1), call(2), call(3)] == [1, 1, 1] and function._cache_size() == 3
    # Values compile nothing, nor does what was compiled.
    assert [call(1), call(1, factor=3.0), call(2, params=5.0), call(3)] == [0, 0, 0, 0]
    assert call(1, how="plus") == 1 and function._cache_size() == 3  # in the place of the one used longest ago
    assert [call(2), call(3), call(1)] == [0, 0, 1]
    monkeypatch.setenv(compilation.LIMIT_VARIABLE, "many")
    assert compilation.max_programs() == compilation.DEFAULT_LIMIT
