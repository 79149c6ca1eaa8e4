"""The record of a run contains everything that determines its answers."""

from lvlm_jax import methods
from lvlm_jax.journal.record import run_record
from lvlm_jax.processors import load


def test_a_run_records_what_images_are_read_with():
    record = run_record("pocket", "float32", methods.CMAC(), {"seed": 0})
    assert record["image_backend"] == load.BACKEND
    assert record["method"]["name"] == "CMAC"
