"""MME: both layouts, figures counted by hand, files that are wrong."""

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.benchmarks import mme
from tests.evaluation.builders import mme_folder

PROTOCOLS = ["mme/hallucination"]


def sample(folder):
    return Data(mme_folder(folder, TASKS))


PROTOCOL = get("mme/hallucination")
TASKS = {"existence": ["1", "2"], "count": ["1"], "position": ["3"], "color": ["4"]}


def read(folder, **where):
    return mme.read(Data(folder, **where), PROTOCOL)


@pytest.mark.parametrize("nested", [False, True])
def test_both_layouts(tmp_path, nested):
    questions = mme.read(Data(mme_folder(tmp_path, TASKS, nested)), PROTOCOL, need_images=True)
    assert [(q.group, q.id, q.label) for q in questions[:3]] == [
        ("existence", "1.jpg/1", "yes"),
        ("existence", "1.jpg/2", "no"),
        ("existence", "2.jpg/1", "yes"),
    ]
    assert questions[0].text == "Is it so? Please answer yes or no."
    assert all(q.images[0].is_file() for q in questions)


def test_figures_by_hand(tmp_path):
    questions = read(mme_folder(tmp_path, TASKS))
    said = dict.fromkeys((q.key for q in questions), "Yes")
    said["existence", "1.jpg/2"] = "No, it is."
    said["count", "1.jpg/1"] = "It is. Yes"  # not in the first four characters
    said["count", "1.jpg/2"] = "no"
    said["color", "4.jpg/2"] = "  no"
    scores = mme.score(questions, said, PROTOCOL)
    found = {name: float(value) for name, value in scores.values().items()}
    assert found["existence: accuracy"] == 3 / 4
    assert found["existence: accuracy+"] == 1 / 2
    assert found["existence: score"] == 125.0
    assert found["count: score"] == 50.0 and found["count: unparsed"] == 1 / 2
    assert found["position: score"] == 50.0
    assert found["color: score"] == 200.0
    assert found["hallucination"] == 425.0
    assert scores.notes["unparsed"] == 1
    assert scores.sizes()["existence: accuracy+"] == 2


def test_sums_need_all_their_subtasks(tmp_path):
    questions = read(mme_folder(tmp_path, TASKS), groups=("existence", "count"))
    scores = mme.score(questions, dict.fromkeys((q.key for q in questions), "Yes"), PROTOCOL)
    assert "hallucination" not in scores.figures and "perception" not in scores.figures


def test_missing_subtask(tmp_path):
    folder = mme_folder(tmp_path, {"existence": ["1"]})
    with pytest.raises(LVLMError, match="subtask 'count' is missing: no folder MME_Benchmark_release_version/count"):
        read(folder)
    with pytest.raises(LVLMError, match="has no subtask 'smell'"):
        read(folder, groups=("smell",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("One?\tYes\n", "has 1 lines; expected two questions"),
        ("One? Yes\nTwo?\tNo\n", "line 1 of MME file .* expected a question, a tab"),
        ("One?\tYes\nTwo?\tPerhaps\n", "line 2 of MME file"),
        ("", "is empty"),
    ],
)
def test_bad_files(tmp_path, content, message):
    folder = mme_folder(tmp_path, {"existence": ["1"]})
    (folder / "MME_Benchmark_release_version/existence/1.txt").write_text(content)
    with pytest.raises(LVLMError, match=message):
        read(folder, groups=("existence",))


def test_missing_picture(tmp_path):
    folder = mme_folder(tmp_path, {"existence": ["1"]})
    (folder / "MME_Benchmark_release_version/existence/1.jpg").unlink()
    with pytest.raises(LVLMError, match="no 1.jpg or .png in"):
        mme.read(Data(folder, groups=("existence",)), PROTOCOL, need_images=True)
