"""`lvlm attention`: what it writes for two pictures and a method, and one line with exit code 2 for bad input."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.cli import attention
from lvlm_jax.weights import names
from tests.cli.command import refuses, write_small
from tests.models.families.patches import QWEN2_VL


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """Four decoder layers, the fewest that have anchors."""
    return write_small(tmp_path_factory.mktemp("models") / "shallow", layers=4)


def page_of(*words, out):
    """The page of a run, and the data in it."""
    assert attention.main([str(word) for word in (*words, "--out", out)]) == 0
    built = (out / "index.html").read_text(encoding="utf-8")
    return built, json.loads(re.search(r'id="data">(.*?)</script>', built, re.S)[1])


def test_what_is_written(shallow, tmp_path):
    """Two pictures, greedy beside CMAC, over the same words with markup among them."""
    wide, out = tmp_path / "wide.png", tmp_path / "out"
    Image.new("RGB", (192, 96), (40, 80, 120)).save(wide)
    answer = "</script><b>The dog & the cat.</b> " + "the image shows a dog " * 3
    words = ["--model", shallow, "--image", names.pocket_file("sample.png"), "--image", wide, "--answer", answer]
    words += ["--method", "cmac", "--alpha", "2", "--prompt", "What is <b>here</b>?"]
    built, data = page_of(*words, out=out)
    # It is small, stands alone, and markup in texts stays text.
    assert len(built.encode()) < 3_000_000
    assert "http" not in built.replace("http-equiv", "") and not re.search(r"src=|href=|url\(", built)
    assert len(data["pictures"]) == 2 and data["layers"] == 4 and data["heads"] == 8
    assert "</script><b>" in data["answers"][0]["text"] or "<b>" in data["question"]
    assert built.count("</script>") == 2 and "<b>here" not in built
    # Both answers have their words, maps and curves.
    greedy, cmac = data["answers"]
    assert [greedy["name"], cmac["name"]] == ["greedy", "CMAC"] and cmac["settings"].startswith("alpha 2, beta 0.2")
    for one in (greedy, cmac):
        count = len(one["words"])
        assert count >= 15
        assert all(one["text"][start:end] == word for word, start, end in one["words"])
        assert len(one["probe"]) == len(one["drift"][0]) == count
        assert len(one["flow"]) == 5 and one["flow"][0] == 0 and one["flow"][-1] > 0
    assert greedy["maps"] != cmac["maps"]  # CMAC turns image keys
    assert greedy["probe"] == cmac["probe"]  # of the model without a method
    names_written = {path.name for path in out.iterdir()}
    pictures = {f"words_{answer}_{image}.png" for answer in ("greedy", "cmac") for image in (1, 2)}
    pictures |= {"image_mass.png", "sinks.png", "flow.png", "probe.png", "drift.png"}
    assert names_written == {"index.html"} | pictures
    for name in pictures:
        with Image.open(out / name) as image:
            assert image.width > 400 and np.asarray(image.convert("L")).std() > 5


@pytest.mark.slow
def test_pictures_with_grids_of_their_own(tmp_path):
    """Qwen2-VL: two pictures of different sizes on one page."""
    model, out = tmp_path / "model", tmp_path / "out"
    tokenizer = QWEN2_VL.write_processor(model)
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 4}
    QWEN2_VL.build(model, 5, text=text, **QWEN2_VL.token_ids(tokenizer))
    words = ["--model", model, "--answer", "a red dog", "--method", "vaf", "--start-layer", "0"]
    for number, size in enumerate(((40, 16), (16, 24))):
        Image.new("RGB", size, (40, 80, 120)).save(tmp_path / f"{number}.png")
        words += ["--image", tmp_path / f"{number}.png"]
    _, data = page_of(*words, out=out)
    assert data["grids"] == [[2, 5], [3, 2]] and len(data["pictures"]) == 2
    pictures = {f"words_{answer}_{image}.png" for answer in ("greedy", "vaf") for image in (1, 2)}
    assert {path.name for path in out.glob("words_*")} == pictures


@pytest.mark.parametrize(
    "words, message",
    [
        (["--method", "nothing"], "there is no method 'nothing'"),
        (["--method", "cmac", "--compare", "nobody"], "there is no method 'nobody'"),
        (["--image", "missing.png"], "does not exist"),
        (["--max-new-tokens", "0"], "out of range"),
        (["--alpha", "3"], "it is a setting of --method"),
        (["--out", "file/folder"], "cannot be made"),
        (["--answer", "..."], "no words to look at"),
        (["--prompt", "<image> <image> which?"], "2 <image> placeholders"),
    ],
)
def test_one_line_and_code_two(shallow, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    refuses(monkeypatch, capsys, message, "attention", "--model", shallow, *words)
