"""Run by `test_mesh` in each of several processes that JAX joins: the small model over a mesh of all of them.

Arguments: checkpoint folder, file of inputs, file for results (process 0 writes it), sizes of the mesh such as 1,2,1.
"""

import sys

import jax
import numpy as np

from lvlm_jax import LVLM, methods, parallel


def answers(model: LVLM, inputs: dict) -> dict[str, np.ndarray]:
    """Logits of the prompts; tokens and log-probabilities of answers under CMAC."""
    output = model.generate(inputs, methods.CMAC(alpha=1.0), max_new_tokens=5)
    logits = np.asarray(parallel.local(model.logits(inputs)))
    return {"logits": logits, "tokens": output.tokens, "logprobs": output.logprobs}


def main(folder: str, inputs_file: str, results_file: str, sizes: str) -> None:
    assert parallel.start()
    model = LVLM.from_pretrained(folder, mesh=parallel.make_mesh(*map(int, sizes.split(","))))
    found = answers(model, dict(np.load(inputs_file)))
    if jax.process_index() == 0:
        np.savez(results_file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
