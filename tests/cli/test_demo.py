"""The demo: with smol where it is installed, and with a description that VCD corrects and one that it damages."""

from types import SimpleNamespace

from PIL import Image

from lvlm_jax import config_files
from lvlm_jax.cli import demo, demo_card, infer
from lvlm_jax.pocket.catalogue import CATEGORIES
from lvlm_jax.pocket.scenes import scene_at
from lvlm_jax.weights import smol


def test_the_demo_is_of_smol_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(smol, "is_installed", lambda: True)
    config = config_files.load_config("infer")
    config.demo.examples.images = 7
    monkeypatch.setattr(config_files, "load_config", lambda name: config.copy_and_resolve_references())
    alone, named, asked = (infer.command_line(words) for words in ([], ["--model", "pocket"], ["--prompt", "Hello"]))
    assert (alone.model_path, named.model_path, asked.model_path) == ("smol", "pocket", "pocket")
    assert alone.examples and not named.examples and not asked.examples
    monkeypatch.setattr(smol, "is_installed", lambda: False)
    assert infer.command_line([]).model_path == "pocket"


def test_examples_mark_what_is_not_there_and_say_how_often(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = config_files.load_config("infer").demo.examples
    scenes = [scene_at("test", chosen[kind].scene, chosen[kind].seed) for kind in ("mended", "spoilt")]
    absent = [next(name for name in CATEGORIES if name not in scene.counts) for scene in scenes]
    there = [next(iter(scene.counts)) for scene in scenes]

    def generate(asked, method, max_new_tokens):
        assert len(asked) == 2 and max_new_tokens == 9
        words = [absent[0], there[1]] if method is None else [there[0], absent[1]]
        return SimpleNamespace(text=[f"I see a {word}." for word in words])

    demo.show(SimpleNamespace(generate=generate), chosen, 9)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith(f"I see a {absent[0]}. [not there: {absent[0]}]") and lines[3].endswith(f"{there[0]}.")
    assert lines[7].endswith(f"{there[1]}.") and lines[8].endswith(f"[not there: {absent[1]}]")
    for place, kind in ((4, "mended"), (9, "spoilt")):
        assert f"In {chosen[kind].count} of {chosen.images} images" in lines[place]
        with Image.open(tmp_path / "runs" / f"demo_{kind}.png") as card:  # the image, and one red word beside it
            assert card.width == demo_card.WIDTH and card.height >= demo_card.SIDE
            assert sum(count for count, colour in card.convert("RGB").crop((320, 0, *card.size)).getcolors(10**6)
                       if colour[0] > 150 and colour[1] < 90) > 100  # fmt: skip
    assert demo.marked("No, there is no dog.", {}) == "No, there is no dog."
    assert demo.pieces("A Dog and a cat.", {"cat": 1}) == [("A ", False), ("Dog", True), (" and a cat.", False)]
