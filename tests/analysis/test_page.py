"""The page: its packed values can be unpacked, it stays small, and it needs no other file."""

import base64
import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.analysis import Word, page
from lvlm_jax.errors import LVLMError

HOSTILE = '</script><img src="x" onerror="alert(1)"> & “so” \u2028on <b>x</b>'


def picture(width=900, height=600, region=None):
    noise = np.random.default_rng(0).integers(0, 255, (height // 20, width // 20, 3), np.uint8)
    return page.Picture(Image.fromarray(noise).resize((width, height)), region)


def answer(name="greedy", text="a red dog runs", words=4, layers=3, heads=2, grid=(4, 5)):
    """Answers about two images with different grids."""
    rng = np.random.default_rng(0)
    curves, sizes = rng.random((words, layers)), (grid, (grid[0] + 1, grid[1]))
    return page.Answer(
        name=name, settings="alpha 3", text=text, words=[Word("dog", 0, 3, (index,)) for index in range(words)],
        maps=[rng.exponential(size=(layers, heads, words, *size)).astype(np.float32) / 1e4 for size in sizes],
        mass=rng.random((layers, heads, words)), sinks=rng.random((layers, heads)), flow=rng.random(layers + 1),
        probe=curves, drift=(curves, curves),
    )  # fmt: skip


def built_of(*answers, title="t", question="q"):
    return page.build(title, question, [picture(), picture()], answers or [answer()])


def numbers(packed):
    return np.frombuffer(base64.b64decode(packed), np.uint8) / 255


def read(built: str) -> dict:
    """The values that the page's script reads."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', built, re.S)
    return json.loads(found)


def test_maps_come_back_out():
    given = answer()
    built = read(built_of(given))
    assert built["groups"] == ["mean", "max", "0", "1"] and built["band"] == 1
    assert built["grids"] == [[4, 5], [5, 5]]
    packed = built["answers"][0]
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<f4").reshape(4, 3, 4, 1)
    maps = numbers(packed["maps"]).reshape(4, 3, 4, -1) ** 2 * scales
    flat = np.concatenate([maps.reshape(3, 2, 4, -1) for maps in given.maps], axis=-1)
    for found, expected in zip(maps, [flat.mean(1), flat.max(1), flat[:, 0], flat[:, 1]], strict=True):
        np.testing.assert_allclose(found, expected, atol=0.005 * expected.max())
    mass = numbers(packed["mass"]) ** 2
    np.testing.assert_allclose(mass.reshape(4, 3, 2), given.mass.transpose(2, 0, 1), atol=0.005)
    # A small weight beside a large one is not lost.
    maps = np.array([1.0, 0.001, 0.0], np.float32)
    np.testing.assert_allclose(numbers(page.pack(maps.reshape(1, 1, 1, 3))[0]) ** 2, maps, rtol=0.02)


def test_text_of_the_model_stays_text():
    built = built_of(answer(name=HOSTILE, text=HOSTILE), title=HOSTILE, question=HOSTILE)
    assert "<img" not in built and 'alert(1)">' not in built.replace("\\u003e", ">x")
    assert built.count("</script>") == 2
    data = read(built)
    assert data["answers"][0]["text"] == data["question"] == data["title"] == HOSTILE
    (title,) = re.findall("<title>(.*)</title>", built)
    assert html.unescape(title) == HOSTILE and "<" not in title


def test_nothing_outside_is_referred_to():
    built = built_of()
    assert "http" not in built.replace("http-equiv", "")
    assert "default-src 'none'" in built
    assert not re.search(r"@import|url\(|<link|\bfetch\(|XMLHttp|import\(|src=|href=", built)
    assert all(one["source"].startswith("data:image/") for one in read(built)["pictures"])


@pytest.mark.parametrize(
    "words, layers, heads, grid", [(40, 8, 8, (8, 8)), (40, 32, 32, (24, 24)), (400, 32, 32, (24, 24))]
)
def test_size_with_two_images_and_two_answers(words, layers, heads, grid):
    answers = [answer(name, words=words, layers=layers, heads=1, grid=grid) for name in ("greedy", "CMAC")]
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)  # no picture is larger than this
    # Memory of the test: heads that are all alike, without a copy of them.
    for one in answers:
        maps = [np.broadcast_to(image, (layers, heads, *image.shape[2:])) for image in one.maps]
        object.__setattr__(one, "maps", maps)
        object.__setattr__(one, "mass", np.broadcast_to(one.mass, (layers, heads, words)))
    built = page.build("t", "q", [page.Picture(Image.fromarray(noise))] * 2, answers)
    assert len(built.encode()) < 5_000_000
    data = read(built)
    assert (data["groups"] == ["mean"]) == (heads == 32)
    assert (data["band"] > 1) == (words == 400)


def test_the_part_that_was_seen():
    seen = read(page.build("t", "q", [picture(region=(150, 0, 750, 600)), picture()], [answer()]))["pictures"]
    np.testing.assert_allclose(seen[0]["region"], [1 / 6, 0, 2 / 3, 1])
    assert seen[1]["region"] == [0, 0, 1, 1] and max(seen[0]["size"]) == page.LONGEST_SIDE


def test_an_answer_without_words_is_refused():
    with pytest.raises(LVLMError, match="CMAC has no words"):
        built_of(answer(), answer("CMAC", words=0))
    with pytest.raises(LVLMError, match="nothing has no words"):
        page.build("t", "q", [picture()], [])
