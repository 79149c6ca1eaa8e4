import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lvlm_jax.errors import LVLMError
from tests.training import line


def steps_in(workdir):
    return sorted(int(path.name) for path in (workdir / "line").iterdir())


def files_of(workdir, step):
    return [path for path in sorted((workdir / "line" / str(step)).rglob("*")) if path.is_file()]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(work folder of a finished run with checkpoints 20 and 30, trained kernel)"""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, line.train(line.task(), workdir)


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that folder."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def test_only_the_newest_checkpoints_are_kept(whole):
    assert steps_in(whole[0]) == [20, 30]


def test_a_checkpoint_tells_what_it_is(whole):
    record = json.loads((whole[0] / "line" / "30" / "record" / "metadata").read_text())
    assert record["step"] == record["next_batch"] == 30 and record["seed"] == 0
    assert record["config"]["peak"] == 0.1
    assert record["versions"]["jax"] == jax.__version__
    assert record["trainable"] == {"layer/kernel": "float32[3, 2]"} and len(record["base"]) == 64


@pytest.mark.parametrize("damage", [os.remove, cut, flip], ids=["gone", "cut", "flipped"])
@pytest.mark.parametrize("part", ["largest", "record"])
def test_an_unreadable_newest_checkpoint_is_reported_and_the_one_before_is_used(whole, copy, damage, part):
    files = files_of(copy, 30)
    largest = max((path for path in files if path.parent.name == "d"), key=lambda path: path.stat().st_size)
    record = next(path for path in files if path.name == "metadata")
    damage(largest if part == "largest" else record)
    with pytest.warns(UserWarning, match=r"checkpoint 30 of .*line cannot be read \(.+\)") as warned:
        resumed = line.train(line.task(), copy)
    # A coroutine that orbax leaves behind may be collected meanwhile, which Python says too.
    (said,) = (str(one.message) for one in warned if one.category is UserWarning)
    assert "\n" not in said
    np.testing.assert_array_equal(resumed, whole[1])
    assert steps_in(copy) == [20, 30]
    assert line.curve(copy) == line.curve(whole[0])
    line.train(line.task(lambda step: pytest.fail("step 30 was not written anew")), copy)


def test_when_none_can_be_read_nothing_is_removed(copy):
    for step in (20, 30):
        for path in files_of(copy, step):
            if path.parent.name == "d":
                path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(LVLMError, match="no checkpoint in .*line can be read"):
        line.train(line.task(), copy)
    assert steps_in(copy) == [20, 30]


def test_what_a_killed_process_was_writing_is_passed_over_and_removed(whole, copy):
    torn = copy / "line" / "30.orbax-checkpoint-tmp"
    (copy / "line" / "30").rename(torn)
    np.testing.assert_array_equal(line.train(line.task(), copy), whole[1])
    assert steps_in(copy) == [20, 30]


@pytest.mark.parametrize(
    ("begin", "fault"),
    [
        (
            ({"layer": {"kernel": jnp.zeros((5, 2))}}, line.start()[1]),
            r"float32\[3, 2\] there and float32\[5, 2\] here",
        ),
        (({"layer": {"bias": jnp.zeros(2)}}, line.start()[1]), "layer/bias is missing there"),
        ((line.start()[0], {"layer": {"target": jnp.zeros((3, 2))}}), "its frozen parameters had other values"),
    ],
    ids=["shape", "name", "base"],
)
def test_a_checkpoint_of_another_model_is_an_error(whole, begin, fault):
    with pytest.raises(LVLMError, match=f"that of another model .*{fault}.*another --workdir"):
        line.train(line.task(), whole[0], begin=begin)
    assert steps_in(whole[0]) == [20, 30]


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch, when):
    kernel = line.train(line.task(), tmp_path, steps=30, save_every=10)
    handler = ocp.StandardCheckpointHandler
    written = handler.async_save

    class Failing:
        def result(self, timeout=None):
            raise NO_SPACE

    async def full(self, *arguments, **options):
        if when == "at once":
            raise NO_SPACE
        return [*await written(self, *arguments, **options), Failing()]

    monkeypatch.setattr(handler, "async_save", full)
    with pytest.raises(LVLMError) as raised, pytest.warns(UserWarning):
        line.train(line.task(), tmp_path, steps=60, save_every=10)
    message = str(raised.value)
    assert "No space left on device" in message and "that of step 30 is intact" in message
    assert "\n" not in message
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="another configuration"):
        line.train(line.task(), tmp_path, steps=60, save_every=10)
    assert steps_in(tmp_path) == [50, 60] and kernel.shape == (3, 2)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "line").write_text("a file is in the way")
    with pytest.raises(LVLMError, match="line cannot be written"):
        line.train(line.task(), tmp_path)
