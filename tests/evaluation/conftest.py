"""The small split of the pocket world that runs of an evaluation ask about."""

import pytest

from lvlm_jax.pocket.splits import write_split


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket") / "world"
    write_split(folder, "test", 12)
    return folder
