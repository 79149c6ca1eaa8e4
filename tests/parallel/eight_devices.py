"""Run by `test_mesh` in a process of its own, on eight simulated devices: the small model over a 2 x 2 x 2 mesh.

Arguments: checkpoint folder, file of inputs, file for results.
"""

import json
import sys

import jax
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.generation import decode_loop
from lvlm_jax.parallel import make_mesh
from lvlm_jax.weights.tables import flatten
from tests.parallel.infer_over_processes import answers


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
    parameters = {path: placed(leaf) for path, leaf in flatten(model.params).items()}
    print(json.dumps({"parameters": parameters, "images": shares}))


if __name__ == "__main__":
    main(*sys.argv[1:])
