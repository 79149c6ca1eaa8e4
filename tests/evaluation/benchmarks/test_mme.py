"""MME: both layouts, figures counted by hand, files that are wrong."""

import pytest

from lvlm_jax.evaluation import Data
from tests.evaluation.builders import mme_folder, read, scored
from tests.refusals import refused

PROTOCOLS = ["mme/hallucination"]
TASKS = {"existence": ["1", "2"], "count": ["1"], "position": ["3"], "color": ["4"]}


def sample(folder):
    return Data(mme_folder(folder, TASKS))


@pytest.mark.parametrize("nested", [False, True])
def test_both_layouts(tmp_path, nested):
    questions = read("mme", mme_folder(tmp_path, TASKS, nested), need_images=True)
    first = [("existence", "1.jpg/1", "yes"), ("existence", "1.jpg/2", "no"), ("existence", "2.jpg/1", "yes")]
    assert [(q.group, q.id, q.label) for q in questions[:3]] == first
    assert questions[0].text == "Is it so? Please answer yes or no."
    assert all(q.images[0].is_file() for q in questions)


def test_figures_by_hand(tmp_path):
    questions = read("mme", mme_folder(tmp_path, TASKS))
    said = dict.fromkeys((q.key for q in questions), "Yes") | {
        ("existence", "1.jpg/2"): "No, it is.",
        ("count", "1.jpg/1"): "It is. Yes",  # not in the first four characters
        ("count", "1.jpg/2"): "no",
        ("color", "4.jpg/2"): "  no",
    }
    found, scores = scored("mme", questions, said)
    expected = {"existence: accuracy": 3 / 4, "existence: accuracy+": 1 / 2, "existence: score": 125.0}
    expected |= {"count: score": 50.0, "count: unparsed": 1 / 2, "position: score": 50.0, "color: score": 200.0}
    assert (expected | {"hallucination": 425.0}).items() <= found.items()
    assert scores.notes["unparsed"] == 1 and scores.sizes()["existence: accuracy+"] == 2
    # Sums need all their subtasks.
    found, _ = scored("mme", read("mme", tmp_path, groups=("existence", "count")), "Yes")
    assert "hallucination" not in found and "perception" not in found


def test_bad_files(tmp_path):
    folder = mme_folder(tmp_path, {"existence": ["1"]})
    missing = "subtask 'count' is missing: no folder MME_Benchmark_release_version/count"
    refused(missing, read, "mme", folder)
    refused("has no subtask 'smell'", read, "mme", folder, groups=("smell",))
    place = folder / "MME_Benchmark_release_version/existence"
    (place / "1.jpg").unlink()
    refused("no 1.jpg or .png in", read, "mme", folder, groups=("existence",), need_images=True)
    for content, message in (
        ("One?\tYes\n", "has 1 lines; expected two questions"),
        ("One? Yes\nTwo?\tNo\n", "line 1 of MME file .* expected a question, a tab"),
        ("One?\tYes\nTwo?\tPerhaps\n", "line 2 of MME file"),
        ("", "is empty"),
    ):
        (place / "1.txt").write_text(content)
        refused(message, read, "mme", folder, groups=("existence",))
