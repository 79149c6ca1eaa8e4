"""The demo of `lvlm infer`: marks objects that an answer invents; with smol it shows a description that a method fixes,
one that it breaks, and how often each happens.

The images and the counts are in `configs/infer.py`. They come from the table "Captions fixed and broken" of the pocket
benchmark; its images are drawn here again.
"""

from collections.abc import Container
from pathlib import Path
from typing import Any

import ml_collections
from PIL import Image

from lvlm_jax.cli import demo_card
from lvlm_jax.generation.questions import conversation
from lvlm_jax.methods import as_method
from lvlm_jax.pocket import report
from lvlm_jax.pocket.scenes import render, scene_at

KINDS = ("mended", "spoilt")
SAID = (
    "In {count} of {images} images of the benchmark {wrong} names an object that is not there and {right} does not; "
    "in {other} it is the other way round."
)


def marked(text: str, there: Container[str]) -> str:
    """An answer, followed by the objects that it names although they are not `there`; nothing follows
    an answer that begins with "No"."""
    absent = [] if text.startswith("No") else sorted(name for name in report.mentioned(text) if name not in there)
    return text + f" [not there: {', '.join(absent)}]" * bool(absent)


def show(model: Any, chosen: ml_collections.ConfigDict, max_new_tokens: int) -> None:
    """Prints both examples, marks every object that is not in the image, and draws the examples as cards.

    Args:
        model: an `LVLM` that describes images of the pocket world.
        chosen: `demo.examples` of `configs/infer.py`.

    Raises:
        LVLMError: a card cannot be written.
    """
    method = as_method(chosen.method)
    scenes = {kind: scene_at("test", chosen[kind].scene, chosen[kind].seed) for kind in KINDS}
    images = {kind: Image.fromarray(render(scene)) for kind, scene in scenes.items()}
    prompts = [conversation([image], report.DETAILED) for image in images.values()]
    both = {
        name: model.generate(prompts, method=how, max_new_tokens=max_new_tokens).text
        for name, how in (("greedy", None), (method.label, method))
    }
    width = max(map(len, both))
    for place, (kind, scene) in enumerate(scenes.items()):
        path = Path(chosen.folder) / f"demo_{kind}.png"
        print(f"\n{report.DETAILED} ({path})")
        for name, texts in both.items():
            print(f"  {name:{width}}  {marked(texts[place], scene.counts)}")
        wrong, right = ("greedy decoding", method.label) if kind == "mended" else (method.label, "greedy decoding")
        other = chosen[KINDS[1 - place]].count
        caption = SAID.format(count=chosen[kind].count, images=chosen.images, wrong=wrong, right=right, other=other)
        print(f"  {caption}")
        answers = {name: pieces(texts[place], scene.counts) for name, texts in both.items()}
        demo_card.draw(path, images[kind], answers, f"Red: not in the image. {caption}")


def pieces(text: str, visible: Container[str]) -> list[demo_card.Piece]:
    """A description cut into stretches: those that name an object which is not `visible`, and the rest."""
    stretches, at = [], 0
    for match in report.NAMED.finditer(text.lower()):
        if report.FORMS[match[0]] not in visible:
            stretches += [(text[at : match.start()], False), (text[match.start() : match.end()], True)]
            at = match.end()
    return [*stretches, (text[at:], False)]
