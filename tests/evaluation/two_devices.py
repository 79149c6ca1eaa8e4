"""Run by `test_processes` in a process of its own, on two simulated devices: answers with a batch spread over both.

Arguments: checkpoint folder. Prints, as JSON, where a prompt's rows lie, and the answers of one device and of both.
"""

import json
import sys

import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.parallel import make_mesh
from tests import small


def main(folder: str) -> None:
    spread = LVLM.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=1, tensor=1))
    alone = LVLM.from_pretrained(folder)
    conversations = [small.conversation("Is it so?", seed=seed) for seed in range(4)]
    (_, _, prompt, _), _ = spread.prefill_arguments(conversations)
    rows = sorted((str(shard.device.id), shard.data.shape[0]) for shard in prompt.embeddings.addressable_shards)
    found = {"rows": rows}
    for name, model in (("alone", alone), ("spread", spread)):
        pictures = model.encode_images([one[0]["content"][0]["image"] for one in conversations])
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": image}, one[0]["content"][1]]}]
            for one, image in zip(conversations, pictures, strict=True)
        ]
        found[name] = model.generate(messages, methods.VCD(), max_new_tokens=4).tokens
        found[f"{name} image tokens"] = float(np.abs([image.tokens for image in pictures]).sum())
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
