"""Run by `test_mesh` in a process of its own, on eight simulated devices: the small model over a 2 x 2 x 2 mesh.

Arguments: checkpoint folder, file of inputs, file for results.
"""

import json
import sys

import jax
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.generation import drivers
from lvlm_jax.parallel import make_mesh


def main(folder: str, inputs_file: str, results_file: str) -> None:
    model = LVLM.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    leaves = jax.tree_util.tree_leaves_with_path(model.params)
    placements = {
        "/".join(key.key for key in path): {
            "spec": list(leaf.sharding.spec),
            "shard": leaf.addressable_shards[0].data.shape,
            "devices": len(leaf.sharding.device_set),
        }
        for path, leaf in leaves
    }
    inputs = dict(np.load(inputs_file))
    greedy = model.generate(inputs, max_new_tokens=8)
    contrasted = model.generate(inputs, methods.CMAC(alpha=1.0), max_new_tokens=8)
    logits = np.asarray(model.logits(inputs))
    fourfold = {name: np.concatenate([array] * 4) for name, array in inputs.items()}
    encode, shares = drivers.encode_images, []

    def watched(params, config, pixels, *geometry):
        shares.append(pixels.sharding.shard_shape(pixels.shape))
        return encode(params, config, pixels, *geometry)

    drivers.encode_images = watched
    step = model.prefill(fourfold, methods.VCD())[1]
    np.savez(
        results_file,
        vcd=np.stack([step.main, step.contrast]),
        logits=logits,
        greedy=greedy.tokens,
        greedy_logprobs=greedy.logprobs,
        cmac=contrasted.tokens,
        cmac_logprobs=contrasted.logprobs,
    )
    print(json.dumps({"parameters": placements, "images": shares}))


if __name__ == "__main__":
    main(*sys.argv[1:])
