"""Run by `test_methods` in a process of its own, on two simulated devices: every family, images over both devices.

Argument: a folder for the checkpoints. Prints per family the largest error of the logits, with VCD's other pictures.
"""

import json
import sys
from pathlib import Path

import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.parallel import make_mesh
from tests.models import zoo

ROWS = (0, 2, 2, 0)  # two images, one, one, two


def main(folder: str) -> None:
    mesh, errors = make_mesh(2, 1, 1), {}
    for name in zoo.FAMILIES:
        path = Path(folder) / name
        path.mkdir()
        case = zoo.load(name, path)
        prompt = case.prompt(*ROWS)
        one, two = (
            model.prefill(prompt, methods.VCD())[1] for model in (case.model, LVLM.from_pretrained(path, mesh=mesh))
        )
        logits = (np.stack([step.main, step.contrast]) for step in (one, two))
        errors[name] = float(np.abs(np.subtract(*logits)).max())
    print(json.dumps(errors))


if __name__ == "__main__":
    main(sys.argv[1])
