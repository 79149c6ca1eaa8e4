"""Run by `test_hosts` in each of several processes that JAX joins: trains the miniature, slowly enough to be killed.

Arguments: work folder, seconds of a batch, and what becomes of process 1 after half of the steps (`--fault`): nothing,
an error of its own, a mistake of the user that only it sees, or that it is asked to stop. Process 0 leaves a trained
kernel in `kernel.npy`.
"""

import os
import signal
from pathlib import Path

import numpy as np

from lvlm_jax import parallel
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from tests.parallel import small_run

FAULTS = {"error": ZeroDivisionError("of process 1 alone"), "mistake": LVLMError("a mistake that process 1 sees")}


class Faulty(small_run.Talk):
    fault = None

    def __call__(self, step):
        if step == 10 and self.fault == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == 10 and self.fault:
            raise FAULTS[self.fault]
        return super().__call__(step)


def main(words: list[str]) -> int:
    parser = common.Parser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--fault", choices=[*FAULTS, "stop"])
    flags = parser.parse_args(words)
    assert parallel.start()
    import jax

    if jax.process_index() == 1:
        Faulty.fault = flags.fault
    small_run.Talk = Faulty
    mesh = parallel.make_mesh(data=1, fsdp=-1, tensor=1)
    trained = small_run.train(mesh, flags.workdir, seconds=flags.seconds, save_every=3, keep=2)
    kernel = trained["language_model"]["lm_head"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (small_run.WIDTH // jax.process_count(), small_run.WORDS)
    first = jax.process_index() == 0
    whole = parallel.local(trained, keep=first)
    if first:
        np.save(flags.workdir / "kernel.npy", whole["language_model"]["lm_head"]["kernel"])
    else:
        assert whole["language_model"]["lm_head"]["kernel"] is None
    return 0


if __name__ == "__main__":
    common.run(main)
