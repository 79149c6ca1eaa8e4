"""The demo of `lvlm infer` with smol: a description that a method mends, one that it spoils, how often each happens.

Which pictures, and how often, is in `configs/infer.py`; both come from the table "Captions mended and spoilt" of the
pocket benchmark, whose images are drawn here anew.
"""

from pathlib import Path
from typing import Any

import ml_collections
from PIL import Image

from lvlm_jax.generation.questions import conversation
from lvlm_jax.methods import as_method
from lvlm_jax.pocket import report
from lvlm_jax.pocket.scenes import render, scene_at

SAID = {
    "mended": "greedy decoding named an object that is not there, and {method} did not: in {count} of {images} images",
    "spoilt": "{method} named an object that is not there, and greedy decoding did not: in {count} of {images} images",
}


def show(model: Any, chosen: ml_collections.ConfigDict, max_new_tokens: int) -> None:
    """Prints both examples, each object that is not there marked, and writes their pictures.

    Args:
        model: an `LVLM` that describes pictures of the pocket world.
        chosen: `demo.examples` of `configs/infer.py`.
    """
    method = as_method(chosen.method)
    scenes = {kind: scene_at("test", chosen[kind].scene, chosen[kind].seed) for kind in SAID}
    pictures = {kind: Image.fromarray(render(scene)) for kind, scene in scenes.items()}
    asked = [conversation([picture], report.DETAILED) for picture in pictures.values()]
    both = {
        name: model.generate(asked, method=how, max_new_tokens=max_new_tokens).text
        for name, how in (("greedy", None), (method.label, method))
    }
    width = max(map(len, both))
    folder = Path(chosen.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for place, (kind, scene) in enumerate(scenes.items()):
        path = folder / f"demo_{kind}.png"
        pictures[kind].save(path)
        print(f"\n{report.DETAILED} ({path})")
        for name, texts in both.items():
            absent = sorted(report.mentioned(texts[place]) - set(scene.counts))
            print(f"  {name:{width}}  {texts[place]}" + f" [not there: {', '.join(absent)}]" * bool(absent))
        said = SAID[kind].format(method=method.label, count=chosen[kind].count, images=chosen.images)
        print(f"  {said} of the benchmark")
