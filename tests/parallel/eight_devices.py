"""Run by `test_mesh` in a process of its own, on eight simulated devices: the small model over a 2 x 2 x 2 mesh.

Arguments: checkpoint folder, file of inputs, file for results.
"""

import json
import sys

import jax
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.generation import continuous, decode_loop, prefixes
from lvlm_jax.parallel import make_mesh
from lvlm_jax.weights.tables import flatten
from tests.parallel.infer_over_processes import answers
from tests.small import conversation


def replaced_rows(model: LVLM) -> list[list[int]]:
    """Tokens of six conversations, answered in four rows by continuous batching under CMAC."""
    requests = [(conversation("Eh" + "?" * (i % 3), seed=i if i % 3 else None), i) for i in range(6)]
    found = dict(model.generate_many(requests, methods.CMAC(alpha=1.0), max_new_tokens=6, batch_size=4))
    return [found[number].tokens[0] for number in range(6)]


def alike(model: LVLM) -> list[list[int]]:
    """Tokens of four questions about one picture, in one batch."""
    questions = [conversation("Eh" + "?" * i, seed=1) for i in range(4)]
    return model.generate(questions, max_new_tokens=4).tokens


def placed(leaf: jax.Array) -> tuple:
    """Axes of its dimensions, shape of a shard, number of devices."""
    return list(leaf.sharding.spec), leaf.addressable_shards[0].data.shape, len(leaf.sharding.device_set)


def main(folder: str, inputs_file: str, results_file: str) -> None:
    model = LVLM.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    inputs = dict(np.load(inputs_file))
    found = answers(model, inputs)
    encode, shares = decode_loop.encode_images, []

    def watched(params, config, pixels, *geometry):
        shares.append(pixels.sharding.shard_shape(pixels.shape))
        return encode(params, config, pixels, *geometry)

    decode_loop.encode_images = watched
    step = model.prefill({name: np.concatenate([array] * 4) for name, array in inputs.items()}, methods.VCD())[1]
    np.savez(results_file, vcd=np.stack([step.main, step.contrast]), **found)
    decode_loop.encode_images = encode
    runs, run, begin = [], continuous.run, prefixes.run
    continuous.run = lambda *given: runs.append(run(*given)) or runs[-1]
    rows, spread = replaced_rows(model), [placed(runs[-1].state.caches[0].own[0].key), placed(runs[-1].count)]
    begun = []
    prefixes.run = lambda *given: begun.append(given[4]) or begin(*given)
    shared = {"alike": alike(model), "beginnings": [len(one) for one in begun]}
    parameters = {path: placed(leaf) for path, leaf in flatten(model.params).items()}
    print(json.dumps({"parameters": parameters, "images": shares, "rows": rows, "spread": spread} | shared))


if __name__ == "__main__":
    main(*sys.argv[1:])
