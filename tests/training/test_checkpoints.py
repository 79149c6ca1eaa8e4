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


def arrays_of(workdir, step):
    return [path for path in sorted((workdir / "line" / str(step)).rglob("d/*")) if path.is_file()]


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


def test_the_newest_checkpoints_are_kept_and_tell_what_they_are(whole):
    assert steps_in(whole[0]) == [20, 30]
    record = json.loads((whole[0] / "line" / "30" / "record" / "metadata").read_text())
    assert record["step"] == record["next_batch"] == 30 and record["seed"] == 0
    assert record["config"]["peak"] == 0.1 and record["versions"]["jax"] == jax.__version__
    assert record["trainable"] == {"layer/kernel": "float32[3, 2]"} and len(record["base"]) == 64


@pytest.mark.parametrize("damage", [os.remove, cut, flip], ids=["gone", "cut", "flipped"])
@pytest.mark.parametrize("part", ["largest", "record"])
def test_an_unreadable_newest_checkpoint_is_reported_and_the_one_before_is_used(whole, copy, damage, part):
    largest = max(arrays_of(copy, 30), key=lambda path: path.stat().st_size)
    damage(largest if part == "largest" else copy / "line" / "30" / "record" / "metadata")
    with pytest.warns(UserWarning, match=r"checkpoint 30 of .*line cannot be read \(.+\)") as warned:
        resumed = line.train(line.task(), copy)
    # A coroutine that orbax leaves behind may be collected meanwhile, which Python says too.
    (said,) = (str(one.message) for one in warned if one.category is UserWarning)
    assert "\n" not in said
    np.testing.assert_array_equal(resumed, whole[1])
    assert steps_in(copy) == [20, 30]
    again = line.train(line.task(lambda step: pytest.fail("step 30 was not written anew")), copy)
    np.testing.assert_array_equal(again, whole[1])
    assert line.curve(copy) == line.curve(whole[0])


def test_when_none_can_be_read_nothing_is_removed(copy):
    for path in arrays_of(copy, 20) + arrays_of(copy, 30):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(LVLMError, match="no checkpoint in .*line can be read"):
        line.train(line.task(), copy)
    assert steps_in(copy) == [20, 30]


def test_what_a_killed_process_was_writing_is_passed_over_and_removed(whole, copy):
    (copy / "line" / "30").rename(copy / "line" / "30.orbax-checkpoint-tmp")
    np.testing.assert_array_equal(line.train(line.task(), copy), whole[1])
    assert steps_in(copy) == [20, 30]


def test_a_checkpoint_of_another_model_is_an_error(whole):
    trainable, frozen = line.start()
    for begin, fault in (
        ((line.start(5)[0], frozen), r"float32\[3, 2\] there and float32\[5, 2\] here"),
        (({"layer": {"bias": jnp.zeros(2)}}, frozen), "layer/bias is missing there"),
        ((trainable, {"layer": {"target": jnp.zeros((3, 2))}}), "its frozen parameters had other values"),
    ):
        with pytest.raises(LVLMError, match=f"that of another model .*{fault}.*another --workdir"):
            line.train(line.task(), whole[0], begin=begin)
    assert steps_in(whole[0]) == [20, 30]


@pytest.mark.parametrize("when", ["at once", "in the background"])
def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_intact(copy, monkeypatch, when):
    written, no_space = ocp.StandardCheckpointHandler.async_save, OSError(errno.ENOSPC, "No space left on device")

    class Failing:
        def result(self, timeout=None):
            raise no_space

    async def full(self, *arguments, **options):
        if when == "at once":
            raise no_space
        return [*await written(self, *arguments, **options), Failing()]

    with monkeypatch.context() as patched:
        patched.setattr(ocp.StandardCheckpointHandler, "async_save", full)
        message = r"^[^\n]*No space left on device[^\n]*that of step 30 is intact[^\n]*\Z"
        with pytest.raises(LVLMError, match=message), pytest.warns(UserWarning):
            line.train(line.task(), copy, steps=60)
    with pytest.warns(UserWarning, match="another configuration: steps: 30, now 60"):
        line.train(line.task(), copy, steps=60)
    assert steps_in(copy) == [50, 60]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "line").write_text("a file is in the way")
    with pytest.raises(LVLMError, match="line cannot be written"):
        line.train(line.task(), tmp_path)
