"""The report: differences computed by hand, marks on figures that cannot be compared, and pages that no text breaks."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.cli import report as command
from lvlm_jax.evaluation import BENCHMARKS, Data, get, rescore
from lvlm_jax.evaluation.report import comparisons, examples, leaderboard
from lvlm_jax.evaluation.report import page as report
from lvlm_jax.evaluation.report import runs as report_runs
from lvlm_jax.journal import place
from tests.evaluation.builders import coco_folder, file_of, mme_folder, pope_answers, pope_folder, write_pictures
from tests.evaluation.builders import scored_run as run
from tests.refusals import refused

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "Yes </script><script>alert(1)</script> <img src=x> | *bold* \u2028"
CMAC = {"name": "CMAC", "alpha": 3.0, "beta": 0.2}
SEVI = {"name": "SEVI", "kappa": None, "directions": [0.5] * 100}
GREEDY = ["Yes", "No", "No", "No"] * 10
BETTER = ["Yes", "Yes", "No", "No"] * 10
SWAPPED = ["Yes", "Yes", "No", "Yes"] + ["Yes", "No", "No", "No"] * 9


@pytest.fixture
def data(tmp_path):
    pope_folder(tmp_path / "data", {"random": "yynn" * 10})
    return Data(tmp_path / "data", groups=("random",))


@pytest.fixture
def runs(data, tmp_path):
    run(tmp_path / "runs/greedy", data, GREEDY)
    run(tmp_path / "runs/cmac", data, BETTER, CMAC)
    run(tmp_path / "runs/deep/sevi", data, SWAPPED, SEVI)
    return tmp_path / "runs"


def made(folder, **options):
    """The page's data and the Markdown of a report."""
    page, markdown = (path.read_text(encoding="utf-8") for path in report.write(folder, folder / "report", **options))
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found), markdown, page


def table(found, heading="Methods and benchmarks", title=""):
    (section,) = [section for section in found["sections"] if section["heading"] == heading]
    return next(one for one in section["tables"] if one["title"] == title)


def cells(found_table, name):
    """Column -> [text, interval, difference, verdict, mark, order] of the row of a method."""
    row = next(row for row in found_table["rows"] if row["name"] == name)
    return dict(zip([column["name"] for column in found_table["columns"]], row["cells"], strict=True))


def texts(found_table, *names):
    return [[cell[0] for cell in cells(found_table, name).values()] for name in names]


def test_differences_are_the_hand_computed_ones(runs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all is well
        found, _, page = made(runs)
    overview = table(found)
    assert [row["name"] for row in overview["rows"]] == ["greedy", "CMAC", "SEVI"]
    assert {row["group"] for row in overview["rows"]} == {"llava (abababab, float32)"}
    assert [row["settings"] for row in overview["rows"]] == ["", "alpha 3, beta 0.2", "directions 100 numbers"]
    # Of 40 questions greedy has 30, CMAC all, SEVI 30: one mended and one spoilt.
    assert overview["notes"] == []
    assert found["sizes"] == {"pope/strict": "40 questions, 20 images · coco_pope_random.json"}
    assert found["marks"]["significantly better"] == "▲" and found["legend"][0][1:] == ["▲", "significantly better"]
    greedy, cmac, sevi = (cells(overview, name) for name in ("greedy", "CMAC", "SEVI"))
    assert greedy["accuracy"][0] == "75.0" and greedy["accuracy"][2:5] == ["", "", ""]
    assert cmac["accuracy"][0] == "100.0" and cmac["accuracy"][2].startswith("+25.0 (+12.5 to ")
    assert cmac["accuracy"][3] == "significantly better"
    assert sevi["accuracy"][0] == "75.0" and sevi["accuracy"][2].startswith("0.0 (−")
    assert sevi["accuracy"][3] == "no difference shown"
    # Said yes to 10 of 40, CMAC to 20, SEVI to 12: neither high nor low is good.
    assert cmac["yes ratio"][2].startswith("+25.0 (") and cmac["yes ratio"][3] == "significantly higher"
    answered = texts(table(found, "Answers", "pope/strict"), "CMAC", "SEVI", "greedy")
    assert answered[:2] == [["40", "0", "10", "0", "0.00195"], ["40", "0", "1", "1", "1"]]
    assert answered[2] == ["40", "0", "–", "–", "–"]
    # Intervals are paired bootstraps: ten images of two questions, of which every other one gains half a point.
    compared = comparisons.compare(report_runs.collect(runs)).items()
    comparison = next(found for one, found in compared if one.method[0] == "CMAC")
    drawn = np.random.default_rng(5).integers(0, 10, (20000, 10))
    expected = np.quantile(np.array([1, 0] * 5)[drawn].sum(1) / 20, (0.025, 0.975))
    np.testing.assert_allclose(comparison.differences["random: accuracy"].interval, expected, atol=0.05)
    assert comparison.baseline.method[0] == "greedy"
    # The page refers to nothing outside.
    without_data = re.sub(r'id="data">.*?</script>', "", page, flags=re.S)
    assert "http" not in without_data.replace("http-equiv", "") and "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!\#)|url\(|@import""", without_data)


def test_what_is_not_of_the_same_thing_is_marked_and_not_subtracted(runs, data, tmp_path):
    """The runs have other files, another parser, another model, or scores by other formulas."""
    other = pope_folder(tmp_path / "other", {"random": "ynyn" * 10})
    run(runs / "vcd", Data(other, groups=("random",)), BETTER, {"name": "VCD"})
    run(runs / "dola", data, BETTER, {"name": "DoLa"}, parser="official")
    run(runs / "big", data, BETTER, {"name": "EAH"}, model="llava-13b")
    run(runs / "old", data, BETTER, {"name": "IAT"})
    changed(runs / "old/scores.json", lambda stored: stored["figures"]["random: F1"].update(value=0.9))
    found, markdown, _ = made(runs)
    overview = table(found)
    marks = {row["name"]: row["cells"][0][4] for row in overview["rows"]}
    assert marks["greedy"] == marks["CMAC"] == marks["SEVI"] == ""
    assert {marks["VCD"], marks["DoLa"]} == {"[1]", "[2]"}
    assert all(cells(overview, name)["accuracy"][2:4] == ["", "not compared"] for name in ("VCD", "DoLa", "EAH", "IAT"))
    notes = "\n".join(overview["notes"])
    mark = re.escape(marks["VCD"])
    assert re.search(rf"{mark} other conditions: file random \w{{12}} instead of \w{{12}}(\n|$)", notes)
    assert "parser 'official' instead of 'strict'" in notes
    assert "VCD: not compared: file random" in notes and markdown.count("not compared") >= 4
    assert cells(table(found, "By category", "pope/strict: random"), "VCD")["precision"][4] == marks["VCD"]
    assert [row["group"][:9] for row in overview["rows"]] == ["llava (ab"] * 6 + ["llava-13b"]
    assert "no run of this model without a method under this protocol" in notes
    assert "IAT: not compared: old has random: F1 0.9, this version finds 1.0" in notes


def test_only_what_tells_rows_apart_is_repeated(runs, data):
    run(runs / "strong", data, SWAPPED, CMAC | {"alpha": 9.0})
    found, _, _ = made(runs)
    rows = [(row["name"], row["which"]) for row in table(found, "Answers", "pope/strict")["rows"]]
    assert rows == [("greedy", ""), ("CMAC", "alpha 3"), ("CMAC", "alpha 9"), ("SEVI", "")]
    assert cells(table(found, "Records", "pope/strict"), "CMAC")["folder"][0] == "cmac"
    run(runs / "strong", data, SWAPPED, CMAC, seed=1)  # runs that differ by seed have a row each
    rows = [row["settings"] for row in table(made(runs)[0])["rows"] if row["name"] == "CMAC"]
    assert rows == ["alpha 3, beta 0.2, seed 0, in cmac", "alpha 3, beta 0.2, seed 1, in strong"]


def test_answers_of_others_are_compared_as_they_were_scored(data, tmp_path):
    ours, theirs = pope_answers(tmp_path / "a.jsonl", BETTER), pope_answers(tmp_path / "b.jsonl", GREEDY)
    found = rescore.rescore(get("pope/strict"), data, [str(ours)], [str(theirs)], resamples=200, model="theirs")
    rescore.write(found, tmp_path / "runs/others")
    overview = table(made(tmp_path / "runs")[0])
    assert cells(overview, "method not recorded")["accuracy"][2].startswith("+25.0 (")
    assert overview["notes"] == ["pope/strict, theirs, method not recorded: compared with the answers in b.jsonl"]


def test_controls_and_what_the_method_does_against_them(data, tmp_path):
    figures = run(tmp_path / "runs/shift", data, BETTER)["figures"]

    def against(**bounds):
        middle = {name: {"value": sum(one) / 2, "interval": list(one), "p": 0.01} for name, one in bounds.items()}
        differences = {f"random: {name.replace('_', ' ')}": one for name, one in middle.items()}
        return {"figures": figures, "against": {"differences": differences}}

    shifted = against(accuracy=(0.01, 0.05), F1=(-0.02, 0.03), yes_ratio=(-0.3, -0.1)) | {"about": "a threshold"}
    controls = {"threshold shift": shifted, "cut alone": against(accuracy=(-0.1, -0.05))}
    controls |= {"temperature 1": {"figures": figures}, "greedy": {"figures": figures, "words": "What was said."}}
    run(tmp_path / "runs/cmac", data, BETTER, CMAC, more={"controls": controls})
    run(tmp_path / "runs/sevi", data, BETTER, SEVI)
    found, markdown, _ = made(tmp_path / "runs")
    listed = table(found, "Controls", "pope/strict")
    shift = cells(listed, "threshold shift")
    assert shift["accuracy"][0] == "100.0" and shift["accuracy"][2:4] == ["+3.0 (+1.0 to +5.0)", "significantly better"]
    assert shift["yes ratio"][3] == "significantly lower"
    assert cells(listed, "cut alone")["accuracy"][3] == "significantly worse"
    assert cells(listed, "temperature 1")["accuracy"][2:4] == ["", ""]  # it was not compared
    assert [row["name"] for row in listed["rows"]] == ["the method itself", *controls]
    notes = ["threshold shift: a threshold", "llava (abababab, float32) · CMAC, greedy: What was said."]
    assert listed["notes"] == [*notes, "No controls were run with SEVI."]
    assert "| threshold shift | 100.0 (100.0 to 100.0); +3.0 (+1.0 to +5.0) ▲ |" in markdown


@pytest.mark.parametrize("tokens", [2.0, 20.0])  # a token of a short answer has no time of its own
def test_cost(data, tmp_path, tokens):
    for name, said, method, milliseconds, batch, device in (
        ("greedy", GREEDY, None, 10.0, 16, "cpu"),
        ("cmac", BETTER, CMAC, 15.0, 16, "cpu"),
        ("vcd", BETTER, {"name": "VCD"}, 4.0, 16, "gpu"),
        ("eah", BETTER, {"name": "EAH"}, 90.0, 1, "cpu"),
    ):
        cost = {"tokens": tokens, "milliseconds": milliseconds, "seconds": 9.0, "device": device}
        run(tmp_path / "runs" / name, data, said, method, batch=batch, more={"cost": cost})
    run(tmp_path / "runs/sevi", data, SWAPPED, SEVI)
    listed = table(made(tmp_path / "runs")[0], "Cost", "pope/strict")
    assert texts(listed, "greedy", "CMAC", "EAH", "SEVI") == [
        [f"{tokens}", batch, f"{tokens * time:.1f}", f"{time}" if tokens > 2 else "–"]
        for batch, time in (("16", 10.0), ("16", 15.0), ("1", 90.0))
    ] + [["–", "16", "not recorded", "–"]]
    beside = [cells(listed, name)["ms per answer"][1] for name in ("greedy", "CMAC", "VCD", "EAH")]
    alone = "the model alone ran"
    assert beside == ["", "1.50 times", f"{alone} on another device", f"{alone} in other batches"]


def test_leaderboard(data, tmp_path, monkeypatch):
    monkeypatch.setattr(place, "in_history", lambda recorded: False)
    for name, said, method, commit in (("greedy", GREEDY, None, None), ("cmac", BETTER, CMAC, "123456789, changed")):
        cost = {"tokens": 1.0, "milliseconds": 5.0, "seconds": 9.4, "device": "cpu", "machine": "2 x A|B"}
        run(tmp_path / "runs" / name, data, said, method, more={"cost": cost | {"commit": commit} if commit else None})
    text = leaderboard.write(tmp_path / "runs", tmp_path / "board.md").read_text()
    assert "\n## pope/strict\n\n40 questions, 20 images · coco\\_pope\\_random.json\n" in text
    head, _, cmac, greedy = (line.split(" | ") for line in text.splitlines() if line.startswith("|"))
    assert head[1:3] == ["model", "accuracy ↑"] and head[-3:] == ["commit", "machine", "seconds |"]
    assert cmac[0] == "| CMAC (alpha 3, beta 0.2)" and "▲" in cmac[2]  # the best on top
    assert cmac[-3:] == ["123456789, changed †", r"2 x A\|B", "9 |"]
    assert greedy[0] == "| greedy" and greedy[2].startswith("75.0 (") and greedy[-3:] == ["–", "–", "– |"]
    assert text.count("†") == 2 and "\n\n† This commit is not in the history" in text


def test_shorter_captions_are_pointed_out(tmp_path):
    images = range(1, 31)
    coco = coco_folder(tmp_path / "coco", dict.fromkeys(images, ["dog"]), dict.fromkeys(images, ["A dog."]))
    data = Data(coco, synonyms=coco / "synonyms.txt")
    run(tmp_path / "runs/greedy", data, ["A dog and a bear."] * 30, protocol="chair/512")
    run(tmp_path / "runs/cmac", data, ["A dog."] * 30, CMAC, protocol="chair/512")
    overview = table(made(tmp_path / "runs")[0])
    ours = cells(overview, "CMAC")
    assert ours["C_S"][0] == "0.0" and ours["C_S"][2:4] == ["−100.0 (−100.0 to −100.0)", "significantly better"]
    assert ours["words"][0] == "2.0" and ours["words"][2:4] == ["−3.0 (−3.0 to −3.0)", "significantly lower"]
    assert "captions are 3.0 words shorter (−3.0 to −3.0)" in overview["notes"][0]


def test_pictures_are_found_where_a_benchmark_keeps_them(tmp_path):
    data = mme_folder(tmp_path, {"count": ["1"]}, nested=True)
    assert examples.picture("1.jpg", "count", [tmp_path / "no", data]).read_bytes() == b"picture"
    assert examples.picture("1.jpg", "color", [data]) is None
    assert examples.picture("../../count/images/1.jpg", "color", [data]) is None  # names lead nowhere else
    write_pictures(data / "CO3D", "vase/64_43/frame1.jpg")
    found = examples.picture("vase/64_43/frame1.jpg", "identity", [data])
    assert found == data / "CO3D/vase/64_43/frame1.jpg"
    with pytest.warns(UserWarning, match="frame1.jpg"):  # one that cannot be opened is left out
        assert examples.thumbnails([found]) == {}


def test_examples_show_what_was_fixed_and_broken(runs, tmp_path):
    pictures = tmp_path / "val2014"
    pictures.mkdir()
    for name in ("COCO_val2014_000000000000.jpg", "COCO_val2014_000000000001.jpg"):
        Image.effect_noise((500, 300), 80).convert("RGB").save(pictures / name)
    found, _, _ = made(runs, images=[pictures], each=10)
    by = [[one["method"] for one in example["answers"]] for example in found["examples"]]
    # A question that both methods mended is shown once.
    assert sorted(by) == [["CMAC"]] * 9 + [["CMAC", "SEVI"], ["SEVI"]]
    (mended,), spoilt = (one for one in found["examples"] if len(one["answers"]) == 2), found["examples"][-1]
    assert [one["fixed"] for one in found["examples"]] == [True] * 10 + [False]
    assert (mended["without"], mended["answers"][1]["text"], mended["right"]) == ("No", "Yes", "yes")
    assert (spoilt["without"], spoilt["answers"][0]["text"], spoilt["right"]) == ("No", "Yes", "no")
    assert mended["question"].startswith("Is there a dog in the image?\nAnswer the question")
    assert mended["pictures"] != spoilt["pictures"] and len(mended["pictures"] + spoilt["pictures"]) == 2
    assert all(source.startswith("data:image/jpeg;base64,") for source in found["pictures"])
    assert found["examples"] == made(runs, images=[pictures], each=10)[0]["examples"]
    without, _, _ = made(runs, each=3)  # no folder of images
    assert {len(one["pictures"]) for one in without["examples"]} == {0}
    path = runs / "greedy/answers.jsonl"  # answers that changed give none
    path.write_text(path.read_text().replace("No", "Yes"))
    with pytest.warns(UserWarning, match="no examples of greedy: .* has changed since it was scored"):
        assert made(runs)[0]["examples"] == []
    for parser, right, wrong, expected in (  # the right answer is read off the one that was right
        ("strict", "No, there is none.", "Yes", "no"),
        ("vcd", "I know", "Yes", "no"),
        ("letter", "The answer is B.", "A", "B"),
        ("short", "A train.", "bus", "train"),
        ("none", "A dog.", "A bear.", ""),
        ("exact", "A tree.", "A dog.", ""),
    ):
        assert examples.right_answer(parser, right, wrong) == expected


def test_text_of_a_model_stays_text(data, tmp_path):
    run(tmp_path / "runs/greedy", data, GREEDY)
    method = {"name": "<b>|CMAC", "prompt": "a | b </script>"}
    run(tmp_path / "runs/cmac", data, [HOSTILE, *BETTER[1:]], method)
    found, markdown, page = made(tmp_path / "runs", each=9, title="<i>Title</i> & more")
    assert page.count("</script>") == 2 and "<script>alert" not in page and "<b>|" not in page
    assert "<title>&lt;i&gt;Title" in page and "\u2028" not in page
    assert found["title"] == "<i>Title</i> & more"
    assert {one["answers"][0]["method"] for one in found["examples"]} == {"<b>|CMAC"}
    assert "# \\<i\\>Title\\</i\\> & more" in markdown and r"\<b\>\|CMAC (prompt a \| b" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:4]}) == 1


def test_the_markdown_table_to_the_letter(runs):
    _, markdown, _ = made(runs, title="T")
    assert markdown.startswith("# T\n\n3 runs, 1 model, 1 protocol; lvlm\\_jax ")
    text = markdown[markdown.index("### pope/strict") : markdown.index("## Controls")]
    assert "- pope/strict: 40 questions, 20 images · coco\\_pope\\_random.json\n" in markdown
    assert "Marks of differences: ▲ significantly better; ▼ significantly worse; " in markdown
    number, same = r"[+−]?\d+\.\d", "○"
    assert re.sub(rf"\({number} to {number}\)", "(…)", text).strip().splitlines() == [
        "### pope/strict",
        "",
        "|  | accuracy ↑ | F1 ↑ | yes ratio | unparsed ↓ |",
        "| --- | --- | --- | --- | --- |",
        "| **llava (abababab, float32)** |  |  |  |  |",
        "| greedy | 75.0 (…) | 66.7 (…) | 25.0 (…) | 0.0 (…) |",
        f"| CMAC (alpha 3, beta 0.2) | 100.0 (…); +25.0 (…) ▲ | 100.0 (…); +33.3 (…) ▲ | 50.0 (…); +25.0 (…) △ | "
        f"0.0 (…); 0.0 (…) {same} |",
        f"| SEVI (directions 100 numbers) | 75.0 (…); 0.0 (…) {same} | 68.8 (…); +2.1 (…) {same} "
        f"| 30.0 (…); +5.0 (…) {same} | 0.0 (…); 0.0 (…) {same} |",
    ]


def test_a_figure_of_several_groups_has_a_table_of_its_own(tmp_path):
    run(tmp_path / "runs/greedy", file_of("pope").sample(tmp_path / "three"), ["Yes", "No", "No", "No"] * 6)
    found, _, _ = made(tmp_path / "runs")
    assert found["sections"][1]["heading"] == "By category"  # no method, no controls
    titles = [one["title"].removeprefix("pope/strict: ") for one in found["sections"][1]["tables"]]
    assert titles[:3] == ["all questions together", "accuracy", "precision"]
    columns = [column["name"] for column in table(found, "By category", "pope/strict: accuracy")["columns"]]
    assert columns == ["mean", "random", "popular", "adversarial"]


def test_sixteen_methods_with_pictures_stay_below_five_megabytes(tmp_path, monkeypatch):
    pictures = tmp_path / "images"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
    paths = [pictures / f"COCO_val2014_{i:012d}.jpg" for i in range(8)]
    for i, path in enumerate(paths):  # noise is what JPEG cannot make small
        Image.fromarray(noise + np.uint8(i)).save(path, quality=95)
    for name in ("pope/strict", "chair/512", "mme/hallucination", "amber/all"):
        benchmark = BENCHMARKS[get(name).benchmark]
        data = file_of(benchmark.name).sample(tmp_path / name)
        count = len(benchmark.read(data, get(name)))
        for method in (None, *({"name": f"M{i}", "alpha": i / 7} for i in range(16))):
            said = "Yes " + "a bear " * 400 if method else "No way, " + "a dog " * 400
            run(tmp_path / "runs" / name / str(method and method["name"]), data, [said] * count, method, name)
    found, markdown, page = made(tmp_path / "runs", images=[pictures], each=4)
    assert len(table(found)["rows"]) == 17
    assert sum(len(one["answers"]) for one in found["examples"]) > 100 and len(found["pictures"]) > 3
    assert len(page.encode()) < 5_000_000 and len(markdown) < 1_000_000
    monkeypatch.setattr(examples, "PICTURE_BYTES", 20_000)  # pictures share a budget
    thumbnails = examples.thumbnails(paths)
    assert len(thumbnails) == 8 and sum(map(len, thumbnails.values())) < 28_000


def changed(path, change):
    """Applies a change to the JSON of a scores file."""
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ("", "is empty"),
        ("[1]", "not of the form .*list"),
        (lambda stored: stored["record"].update(version="9.0.0"), "written by lvlm_jax 9.0.0"),
        (lambda stored: stored.pop("figures"), r"not of the form .*no 'figures'"),
        (lambda stored: stored["record"]["protocol"].update(shots=3), "not of the form .*unexpected keyword"),
        (lambda stored: stored["record"]["protocol"].update(benchmark="vqa"),
         "benchmark 'vqa', which this version does not know"),
        (lambda stored: stored["per_image"]["counts"].pop(), "not of the form .*reshape"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_read(data, tmp_path, change, message):
    run(tmp_path / "runs/cmac", data, BETTER, CMAC)
    path = tmp_path / "runs/cmac/scores.json"
    path.write_text(change) if isinstance(change, str) else changed(path, change)
    assert "cmac" in refused(message, report.write, tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(tmp_path / "runs/greedy", data, GREEDY)
    with pytest.warns(UserWarning, match="left out: scores file .*cmac"):
        found, _, _ = made(tmp_path / "runs")
    assert [row["name"] for row in table(found)["rows"]] == ["greedy"]


def test_from_the_command_line(runs, tmp_path):
    """In a process of its own, with JAX told to use a platform that does not exist: no model is touched."""
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "JAX_PLATFORMS": "none_such",
        "HOME": str(tmp_path),
    }

    def call(*words):
        line = [sys.executable, str(ROOT / "tools/report.py"), *words]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert call("runs", "--out", "out", "--title", "T") == (0, "")
    board = [str(runs), "--leaderboard", str(tmp_path / "board.md")]
    assert command.main(board) == 0 and (tmp_path / "board.md").is_file()
    refused("leave --out and --images out", command.main, [*board, "--out", "out"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "report.md"}
    code, said = call("data")
    assert code == 2 and said.count("\n") == 1 and said.startswith("lvlm report: no scores.json")
    (runs / "cmac/scores.json").write_text("{")
    code, said = call("runs")
    assert code == 0 and said.count("\n") == 1
    assert said.startswith("warning: left out: scores file 'runs/cmac/scores.json'")
    refused("is not a folder; give the one that holds the runs", report.write, tmp_path / "nowhere", tmp_path / "out")
    message = "image folder .* is not a folder"
    refused(message, report.write, tmp_path, tmp_path / "out", images=[tmp_path / "nowhere"])
