"""Run by `test_hosts` in each of several processes that JAX joins: trains the miniature, slowly enough to be killed.

Arguments: work folder, seconds of a batch, and what becomes of process 1 after half of the steps (`--fault`): nothing,
an error of its own, or a mistake of the user that only it sees.
"""

import time
from pathlib import Path

from lvlm_jax import parallel
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from tests.parallel import small_run

FAULTS = {"error": ZeroDivisionError("of process 1 alone"), "mistake": LVLMError("a mistake that process 1 sees")}


class Faulty(small_run.Talk):
    fault = None

    def __call__(self, step):
        if self.fault and step == 10:
            raise self.fault
        return super().__call__(step)


def main(words: list[str]) -> int:
    parser = common.Parser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--fault", choices=FAULTS)
    flags = parser.parse_args(words)
    assert parallel.start()
    import jax

    if flags.fault and jax.process_index() == 1:
        Faulty.fault = FAULTS[flags.fault]
    small_run.Talk = Faulty
    mesh = parallel.make_mesh(data=1, fsdp=-1, tensor=1)
    began = time.monotonic()
    small_run.train(mesh, flags.workdir, seconds=flags.seconds, save_every=3, keep=2)
    print(f"trained in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    common.run(main)
