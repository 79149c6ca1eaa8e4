"""Checks the shapes in signatures while tests run, and makes the small model that many tests share."""

import os
from pathlib import Path

# Tests count compilations, and must not leave programs behind in the user's cache.
os.environ["LVLM_JAX_COMPILATION_CACHE"] = "0"
# Where the one library lies that tests build too.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "user")

import pytest
from jaxtyping import install_import_hook

import tests.signatures
from tests.compiler import compile_quickly, drop_programs, optimised

# The rooms whose signatures are shapes. The public face is not among them: it answers for wrong types itself.
install_import_hook(
    [
        "lvlm_jax.attention",
        "lvlm_jax.generation.decode_loop",
        "lvlm_jax.generation.forward",
        "lvlm_jax.processors.layout",
        "lvlm_jax.generation.sampling",
        "lvlm_jax.generation.state",
        "lvlm_jax.methods",
        "lvlm_jax.models",
    ],
    f"{tests.signatures.__name__}.check",
)


# Tests run programs for milliseconds and compile them for seconds; files that want theirs whole are marked.
compile_quickly()


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Compiles with the optimisation level of a file, and drops its programs afterwards, because they map memory.

    In files marked `full_compiler` programs are those of a user; in the others they are hardly optimised.
    """
    with optimised(request.node.get_closest_marker("full_compiler") is not None):
        yield
    drop_programs()


@pytest.fixture
def all_programs_kept(monkeypatch):
    """While a test counts the programs of a function, none is dropped because of those of the tests before it."""
    from lvlm_jax.compilation import LIMIT_VARIABLE

    monkeypatch.setenv(LIMIT_VARIABLE, "100000")


@pytest.fixture(scope="session")
def torch_model(tmp_path_factory):
    """transformers' own model of the small checkpoint; `torch_model.name_or_path` is the folder."""
    from tests import checkpoints, small

    folder = tmp_path_factory.mktemp("small")
    model = checkpoints.make_llava(folder, seed=3, **small.OVERRIDES)
    small.write_processor(folder)
    model.name_or_path = str(folder)
    return model


@pytest.fixture(scope="session")
def checkpoint(torch_model):
    """Folder of the small checkpoint, with processor files."""
    return torch_model.name_or_path


@pytest.fixture(scope="session")
def model(checkpoint):
    """The small checkpoint as an `LVLM`."""
    from lvlm_jax import LVLM

    return LVLM.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def mixed(torch_model):
    """Left-padded arrays of three prompts with one, no and two images."""
    from tests import checkpoints, small

    return checkpoints.random_inputs(torch_model.config, seed=4, layouts=small.MIXED)


@pytest.fixture(scope="session")
def alone(torch_model, mixed):
    """alone(row): one of the mixed prompts as a batch of its own."""
    from tests import checkpoints

    return lambda row: checkpoints.select(torch_model.config, mixed, row)
