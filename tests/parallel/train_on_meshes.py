"""Run by `test_training` in a process of its own, on eight simulated devices: the same training on several meshes.

Arguments: work folder, and a checkpoint folder to train that model instead of the miniature. Prints the losses of every
step, and the shape of a kernel's shards.
"""

import json
import shutil
import sys
from pathlib import Path

import jax

from lvlm_jax import parallel
from tests.parallel import small_run

MESHES = {"8,1,1": (8, 1, 1), "1,8,1": (1, 8, 1), "2,2,2": (2, 2, 2)}


def main(workdir: Path, folder: str = "") -> None:
    def train(mesh, name):
        if folder:
            return small_run.train_model(folder, mesh, workdir / name)
        return small_run.train(mesh, workdir / name, save_every=10, keep=2)

    shards, names = {}, list(MESHES)
    for name, sizes in MESHES.items():
        trained = train(parallel.make_mesh(*sizes), name)
        kernel = trained["language_model"]["layers_0"]["mlp"]["up_proj"]["kernel"]
        shards[name] = kernel.addressable_shards[0].data.shape
    if folder:
        train(parallel.make_mesh(1, 1, 1, jax.devices()[:1]), "one device")
        names.append("one device")
    else:  # the tenth step's checkpoint of one mesh goes on on another
        shutil.copytree(workdir / "1,8,1", workdir / "moved")
        shutil.rmtree(workdir / "moved" / "talk" / "20")
        train(parallel.make_mesh(2, 2, 2), "moved")
        names.append("moved")
    print(json.dumps({"losses": {name: small_run.losses(workdir / name) for name in names}, "shards": shards}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
