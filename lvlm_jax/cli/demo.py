"""The demo of `lvlm infer` with smol: a description that a method fixes, one that it breaks, and how often each
happens.

The images and the counts are in `configs/infer.py`. They come from the table "Captions mended and spoilt" of the pocket
benchmark; its images are drawn here again.
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
    "mended": "greedy decoding named an object that is not in the image, {method} did not: {count} of {images} images",
    "spoilt": "{method} named an object that is not in the image, greedy decoding did not: {count} of {images} images",
}


def show(model: Any, chosen: ml_collections.ConfigDict, max_new_tokens: int) -> None:
    """Prints both examples with hallucinated objects marked, and writes their images.

    Args:
        model: an `LVLM` that describes images of the pocket world.
        chosen: `demo.examples` of `configs/infer.py`.
    """
    method = as_method(chosen.method)
    scenes = {kind: scene_at("test", chosen[kind].scene, chosen[kind].seed) for kind in SAID}
    pictures = {kind: Image.fromarray(render(scene)) for kind, scene in scenes.items()}
    messages = [conversation([picture], report.DETAILED) for picture in pictures.values()]
    answers = {
        name: model.generate(messages, method=used_method, max_new_tokens=max_new_tokens).text
        for name, used_method in (("greedy", None), (method.label, method))
    }
    width = max(map(len, answers))
    folder = Path(chosen.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for place, (kind, scene) in enumerate(scenes.items()):
        path = folder / f"demo_{kind}.png"
        pictures[kind].save(path)
        print(f"\n{report.DETAILED} ({path})")
        for name, texts in answers.items():
            absent = sorted(report.mentioned(texts[place]) - set(scene.counts))
            print(f"  {name:{width}}  {texts[place]}" + f" [not there: {', '.join(absent)}]" * bool(absent))
        headline = SAID[kind].format(method=method.label, count=chosen[kind].count, images=chosen.images)
        print(f"  {headline} of the benchmark")
