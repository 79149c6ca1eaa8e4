"""Run by `test_methods` in a process of its own, on eight simulated devices: every method on one device and on meshes.

Argument: a folder for the checkpoint. Prints per mesh and method the largest error of the logits and their number.
"""

import json
import sys

import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.parallel import make_mesh
from tests import checkpoints
from tests.methods.test_all_methods import ENTRIES, HASH, LAYOUTS, SEARCHES, build

MESHES = ((2, 2, 2), (1, 4, 2))
STEPS = 2


def steps(model: LVLM, inputs: dict, method: methods.Method | None) -> np.ndarray:
    """Logits of both branches and combined, of the prompt and of a few forced tokens; what is ruled out is 0."""
    state, step = model.prefill(inputs, method, max_length=40)
    found = [step]
    for token in range(STEPS):
        state, step = model.decode(state, np.arange(len(LAYOUTS)) + 3 + token)
        found.append(step)
    parts = [part for step in found for part in (step.main, step.contrast, step.combined) if part is not None]
    return np.nan_to_num(np.stack([np.asarray(part) for part in parts]), neginf=0.0)


def main(folder: str) -> None:
    text = {"num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 120}
    vision = {"image_size": 14, "patch_size": 7}
    torch_model = checkpoints.make_llava(folder, seed=5, text=text, vision=vision)
    inputs = checkpoints.random_inputs(torch_model.config, seed=6, layouts=LAYOUTS)
    alone = LVLM.from_pretrained(folder)
    alone.hash = HASH
    entries = {"greedy": None} | {name: build(name, L=3, E=48) for name in ENTRIES}
    expected = {name: steps(alone, inputs, method) for name, method in entries.items()}
    errors = {}
    for sizes in MESHES:
        spread = LVLM.from_pretrained(folder, mesh=make_mesh(*sizes))
        spread.hash = HASH
        for name, method in entries.items():
            found = steps(spread, inputs, method)
            errors[f"{sizes} {name}"] = [float(np.abs(found - expected[name]).max()), found.size]
        for name in SEARCHES:
            searched = [model.generate(inputs, methods.get(name)(), max_new_tokens=6) for model in (alone, spread)]
            one, eight = ([list(row) for row in output.tokens] for output in searched)
            errors[f"{sizes} {name}"] = [float(one != eight), sum(map(len, one))]
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1])
