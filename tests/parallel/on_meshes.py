"""Run by `test_methods` in a process of its own, on simulated devices: every method, or every family, on meshes.

Arguments: "methods" or "families", a folder for checkpoints. Prints the largest errors beside one device.
"""

import json
import sys
from pathlib import Path

import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.parallel import make_mesh
from tests import checkpoints
from tests.methods.entries import ENTRIES, HASH, LAYOUTS, SEARCHES, build
from tests.models import zoo

MESHES = ((2, 2, 2), (1, 4, 2))
STEPS = 2
ROWS = (0, 2, 2, 0)  # of a family's prompts: two images, one, one, two


def steps(model: LVLM, inputs: dict, method: methods.Method | None) -> np.ndarray:
    """Logits of both branches and combined, of the prompt and of a few forced tokens; what is ruled out is 0."""
    state, step = model.prefill(inputs, method, max_length=40)
    found = [step]
    for token in range(STEPS):
        state, step = model.decode(state, np.arange(len(LAYOUTS)) + 3 + token)
        found.append(step)
    parts = [part for step in found for part in (step.main, step.contrast, step.combined) if part is not None]
    return np.nan_to_num(np.stack([np.asarray(part) for part in parts]), neginf=0.0)


def of_methods(folder: Path) -> dict:
    """Per mesh and method the error of the logits and their number; of searches whether tokens differ."""
    text = {"num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 120}
    torch_model = checkpoints.make_llava(folder, seed=5, text=text, vision={"image_size": 14, "patch_size": 7})
    inputs = checkpoints.random_inputs(torch_model.config, seed=6, layouts=LAYOUTS)
    alone = LVLM.from_pretrained(folder)
    alone.hash = HASH
    entries = {"greedy": None} | {name: build(name, L=3, E=48, T=3, W=32) for name in ENTRIES}
    expected, errors = {name: steps(alone, inputs, method) for name, method in entries.items()}, {}
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
    return errors


def of_families(folder: Path) -> dict:
    """The error of each one's logits, with VCD's other pictures, and of questions that share theirs (`prefixes`).

    Images lie over both devices.
    """
    mesh, errors = make_mesh(2, 1, 1), {}
    for name in zoo.FAMILIES:
        (path := folder / name).mkdir()
        case = zoo.load(name, path)
        found, questions = [], case.prompt(0, 2, 2, 0).with_answers([[5], [6, 7, 8], [5, 5], [9]], 0)
        for model in (case.model, LVLM.from_pretrained(path, mesh=mesh)):
            step, alike = model.prefill(case.prompt(*ROWS), methods.VCD())[1], model.prefill(questions)[1]
            found.append(np.stack([step.main, step.contrast, alike.main]))
        errors[name] = float(np.abs(np.subtract(*found)).max())
    return errors


if __name__ == "__main__":
    print(json.dumps({"methods": of_methods, "families": of_families}[sys.argv[1]](Path(sys.argv[2]))))
