"""Run twice by `test_training`, as two processes that JAX joins: trains the miniature on a mesh over both.

Arguments: work folder, step in which process 1 is asked to stop (-1: never). Process 0 leaves a trained kernel in
`kernel.npy`.
"""

import os
import sys
from pathlib import Path

import numpy as np

from lvlm_jax import parallel


def main(workdir: Path, stop_in: int) -> None:
    assert parallel.start()
    import jax

    from tests.parallel import small_run

    assert jax.process_count() == 2 and len(jax.local_devices()) == 1
    mine = stop_in if os.environ["JAX_PROCESS_ID"] == "1" else None
    trained = small_run.train(parallel.make_mesh(data=1, fsdp=2, tensor=1), workdir, stop_in=mine)
    kernel = trained["language_model"]["lm_head"]["kernel"]
    assert not kernel.is_fully_addressable and kernel.addressable_shards[0].data.shape == (8, 64)
    first = jax.process_index() == 0
    whole = parallel.local(trained, wanted=first)["language_model"]["lm_head"]["kernel"]
    if first:
        np.save(workdir / "kernel.npy", whole)
    else:
        assert whole is None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
