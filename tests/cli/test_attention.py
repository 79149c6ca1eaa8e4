"""`lvlm attention`: what it writes for two pictures and a method, and one line with exit code 2 for bad input."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from lvlm_jax.cli import attention
from lvlm_jax.weights import names
from tests.cli.command import run
from tests.models.families.patches import QWEN2_VL


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The pocket model cut down to four decoder layers, the fewest that have anchors."""
    folder = tmp_path_factory.mktemp("models") / "shallow"
    shutil.copytree(names.pocket_file("checkpoint"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensors[name] for name in tensors if not re.search(r"language_model.*layers\.[4-9]", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def written(shallow, tmp_path_factory):
    """The folder of a run with two pictures, greedy beside CMAC, over the same 40 words with markup among them."""
    folder = tmp_path_factory.mktemp("attention")
    wide = folder / "wide.png"
    Image.new("RGB", (192, 96), (40, 80, 120)).save(wide)
    answer = "</script><b>The dog & the cat.</b> " + "the image shows a dog " * 7
    words = ["--model", shallow, "--image", names.pocket_file("sample.png"), "--image", wide, "--answer", answer]
    words += ["--method", "cmac", "--alpha", "2", "--prompt", "What is <b>here</b>?", "--out", folder / "out"]
    assert attention.main([str(word) for word in words]) == 0
    return folder / "out"


def page_data(folder):
    built = (folder / "index.html").read_text(encoding="utf-8")
    return built, json.loads(re.search(r'id="data">(.*?)</script>', built, re.S)[1])


def test_the_page_is_small_and_stands_alone(written):
    built, data = page_data(written)
    assert len(built.encode()) < 5_000_000
    assert "http" not in built.replace("http-equiv", "") and not re.search(r"src=|href=|url\(", built)
    assert len(data["pictures"]) == 2 and data["layers"] == 4 and data["heads"] == 8


def test_both_answers_have_their_words_maps_and_curves(written):
    _, data = page_data(written)
    assert [answer["name"] for answer in data["answers"]] == ["greedy", "CMAC"]
    assert data["answers"][1]["settings"].startswith("alpha 2, beta 0.2")
    for answer in data["answers"]:
        count = len(answer["words"])
        assert count >= 40
        assert all(answer["text"][start:end] == word for word, start, end in answer["words"])
        assert len(answer["probe"]) == len(answer["drift"][0]) == count
        assert len(answer["flow"]) == 5 and answer["flow"][0] == 0 and answer["flow"][-1] > 0
    maps = [answer["maps"] for answer in data["answers"]]
    assert maps[0] != maps[1]  # CMAC turns image keys
    assert data["answers"][0]["probe"] == data["answers"][1]["probe"]  # of the model without a method


def test_markup_in_texts_stays_text(written):
    built, data = page_data(written)
    assert "</script><b>" in data["answers"][0]["text"] or "<b>" in data["question"]
    assert built.count("</script>") == 2 and "<b>here" not in built


def test_pictures_are_written(written):
    names = {path.name for path in written.iterdir()}
    words = {f"words_{answer}_{image}.png" for answer in ("greedy", "cmac") for image in (1, 2)}
    assert names == {"index.html", "image_mass.png", "sinks.png", "flow.png", "probe.png", "drift.png"} | words
    for name in names - {"index.html"}:
        with Image.open(written / name) as image:
            assert image.width > 400 and np.asarray(image.convert("L")).std() > 5


@pytest.mark.slow
def test_pictures_with_grids_of_their_own(tmp_path):
    """Qwen2-VL: two pictures of different sizes on one page."""
    model = tmp_path / "model"
    tokenizer = QWEN2_VL.write_processor(model)
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 4}
    QWEN2_VL.build(model, 5, text=text, **QWEN2_VL.token_ids(tokenizer))
    words = ["--model", model, "--answer", "a red dog", "--method", "vaf", "--start-layer", "0"]
    for number, size in enumerate(((40, 16), (16, 24))):
        Image.new("RGB", size, (40, 80, 120)).save(tmp_path / f"{number}.png")
        words += ["--image", tmp_path / f"{number}.png"]
    assert attention.main([str(word) for word in [*words, "--out", tmp_path / "out"]]) == 0
    _, data = page_data(tmp_path / "out")
    assert data["grids"] == [[2, 5], [3, 2]] and len(data["pictures"]) == 2
    assert {path.name for path in (tmp_path / "out").glob("words_*")} == {
        f"words_{answer}_{image}.png" for answer in ("greedy", "vaf") for image in (1, 2)
    }


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
    code, _, printed = run(monkeypatch, capsys, "attention", "--model", shallow, *words)
    assert code == 2 and message in printed and printed.count("\n") == 1
