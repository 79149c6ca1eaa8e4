"""Readers of questions, benchmarks, answers, logs and scores."""

import functools
import json
import pickle
import tempfile
from pathlib import Path

from hypothesis import strategies as st

from lvlm_jax import evaluation
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, chair_truth, get, grid, rescore
from lvlm_jax.evaluation.question import Data
from lvlm_jax.evaluation.report import leaderboard, page
from lvlm_jax.generation import jobs, questions
from lvlm_jax.journal import log
from tests.evaluation.builders import file_of, scored_run
from tests.fuzz import generators as make
from tests.fuzz.engine import Reader, same, used

ASKED = [
    {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "yes"},
    {"question_id": "two", "image": ["a.png", "b.png"], "text": "<image> and <image>?", "label": "no"},
    {"question_id": 3, "text": "Hm?"},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def made(write) -> make.Files:
    """The files that a function writes into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return make.read(Path(folder))


def question_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    asked, failed = questions.read_questions(folder / "q.jsonl")
    rows = dict(enumerate((folder / "q.jsonl").read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1))
    for one in asked:
        row = json.loads(rows[one.line])
        same((one.question_id, one.text, one.image), (row["question_id"], row["text"], row.get("image")), "question")
        used(questions.length_class(one.text), jobs._seed(0, one))
        try:
            questions.conversation(one.image_names, one.text)
        except LVLMError:
            pass
    same(len(asked) + len(failed), sum(bool(row.strip()) for row in rows.values()), "lines")
    for asked in grid.of_file(folder / "q.jsonl", folder, 2):
        used(json.dumps(asked.id), asked.label and asked.label.lower())


def job(files: make.Files, folder: Path) -> None:
    """A job resumes from edited files, and its result answers each question once."""
    make.write(files, folder)

    def answer(conversations, seeds):
        return [jobs.Answer("é", "stop", 1) for _ in seeds]

    path = folder / "a.jsonl"
    summary = jobs.run_job(lambda: answer, folder / "q.jsonl", path, {"model": "m"}, folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    answered = [row["metadata"]["line"] for row in rows]
    same(len(answered), summary.before + summary.now, "answers")
    same(sorted(set(answered)), sorted(answered), "lines answered")


@functools.cache
def job_files() -> make.Files:
    def write(folder: Path) -> None:
        (folder / "q.jsonl").write_bytes(lines([{"question_id": n, "text": "x"} for n in range(4)]))
        jobs.run_job(
            lambda: lambda conversations, seeds: [jobs.Answer("yes", "stop", 1) for _ in seeds],
            folder / "q.jsonl",
            folder / "a.jsonl",
            {"model": "m"},
            folder,
        )
        (folder / "a.jsonl").write_text("".join((folder / "a.jsonl").read_text().splitlines(True)[:3]))

    return made(write)


def logged(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    read = log.read_log(folder / "log.jsonl", {"a": 1, "b": {"c": None}}, log.text_of("said"), ("x", "y", "z"))
    for key, said in read.items():
        same((type(key), type(said)), (str, str), "entry")
    with log.AnswerLog(folder / "log.jsonl", {"a": 1, "b": {"c": None}}, log.text_of("said"), ("x", "y", "z")) as held:
        same(held.answers, read, "log")


LOG = lines([{"record": {"a": 1, "b": {"c": None}}}, {"id": "x", "said": "1"}, {"id": "y", "said": "2"}])


@functools.cache
def benchmark_files(name: str) -> make.Files:
    """The sample folder of a benchmark's tests, with blank images, and with answers to all questions."""

    def write(folder: Path) -> None:
        data, protocol = sampled(name, folder), get(file_of(name).PROTOCOLS[0])
        asked = BENCHMARKS[name].read(data, protocol)
        said = {question.key: "Yes, a dog." for question in asked}
        BENCHMARKS[name].answers.write(folder / "said" / BENCHMARKS[name].answers.name, asked, said, protocol)

    return made(write)


def sampled(name: str, folder: Path) -> Data:
    return file_of(name).sample(folder)


@functools.cache
def where(name: str) -> Data:
    """Where the sample of a benchmark lies, seen from its folder."""
    with tempfile.TemporaryDirectory() as folder:
        return sampled(name, Path(folder))


def located(name: str, folder: Path) -> Data:
    old = where(name)
    places = {
        field: folder / path.relative_to(old.folder)
        for field in ("question_file", "image_folder", "image_list", "synonyms", "chair_pickle")
        if (path := getattr(old, field)) is not None
    }
    return type(old)(**{**vars(old), "folder": folder, **places})


def benchmark(name: str, protocol: str | None = None):
    """Reads the questions of a changed folder, scores them with every answer "yes", then the answers of the folder."""

    def read(files: make.Files, folder: Path) -> None:
        make.write(files, folder)
        data, rule = located(name, folder), get(protocol or file_of(name).PROTOCOLS[0])
        asked = BENCHMARKS[name].read(data, rule)
        same(len({question.key for question in asked}), len(asked), "ids")
        for question in asked:
            used(rule.prompt(question).encode("utf-8", "replace"), question.unit)
        scores = BENCHMARKS[name].score(asked, {question.key: "Yes, a dog." for question in asked}, rule)
        json.dumps(rescore.report(scores, resamples=3), allow_nan=False)
        said = folder / "said" / BENCHMARKS[name].answers.name
        found = rescore.rescore(rule, data, [str(said)], partial=True, resamples=3)
        rescore.write(found, folder / "out")
        json.dumps(found, allow_nan=False)

    return read


def _of_benchmark(name: str) -> Reader:
    def cases():
        files = benchmark_files(name)
        names = [one for one in files if one.rpartition(".")[2] not in ("jpg", "png")]
        return make.changed_folder(files, *names)

    return Reader(f"benchmark {name}", st.deferred(cases), benchmark(name))


PARQUET = [
    {"question_id": 0, "images": ["a.png", "b.png"], "question": "Both?", "label": "yes", "task": "count"},
    {"question_id": 1, "images": ["a.png"], "question": "One?", "label": "no", "task": "count"},
]


@functools.cache
def parquet_files() -> make.Files:
    def write(folder: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(PARQUET), folder / "q.parquet")

    return made(write)


def parquet_file(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    asked = BENCHMARKS["mihbench"].read(Data(folder, folder / "q.parquet"), get("mihbench/short"))
    answers = {question.key: question.label for question in asked}
    json.dumps(rescore.report(BENCHMARKS["mihbench"].score(asked, answers, get("mihbench/short")), resamples=3))


CHOICES = (
    "index\timage\tquestion\tA\tB\tanswer\tcategory\n0\tiVBORw0KGgo=\tWhich?\tred\tblue\tA\tx\n"
    '1\t0\t"Which ""one""?"\tone\ttwo\tB\ty\n'
)


def choices_table(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    rule = get(evaluation.BENCHMARKS["choices"].protocols[0].name)
    asked = BENCHMARKS["choices"].read(Data(folder, folder / "q.tsv"), rule)
    json.dumps(rescore.report(BENCHMARKS["choices"].score(asked, {one.key: "A" for one in asked}, rule), resamples=3))


SCORER = {
    "imid_to_objects": {1: ["dog", "cat"], 2: {"cat"}}, "double_word_dict": {"hot dog": "hot dog"},
    "inverse_synonym_dict": {"dog": "dog", "puppy": "dog", "cat": "cat"}, "caption_annotations": [],
}  # fmt: skip


def chair_pickle(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    objects, lexicon = chair_truth.read_chair_pickle(folder / "chair.pkl")
    stored = pickle.loads(files["chair.pkl"])  # our own, harmless
    expected = {int(image): frozenset(names) for image, names in stored["imid_to_objects"].items()}
    same(objects, expected, "objects")
    lexicon.mentions(lexicon.words("A hot dog and two puppies.", "verbs"))


@functools.cache
def run_files() -> make.Files:
    def write(folder: Path) -> None:
        (folder / "data").mkdir()
        data = sampled("pope", folder / "data")
        asked = BENCHMARKS["pope"].read(data, get("pope/strict"))
        said = ["yes" if number % 2 else "no" for number, _ in enumerate(asked)]
        scored_run(folder / "greedy", data, said)
        scored_run(folder / "cmac", data, said[::-1], method={"name": "cmac", "alpha": 3.0})

    return made(write)


@st.composite
def _runs(draw) -> make.Files:
    """Two runs, one of them changed; or the changed one alone."""
    files = run_files()
    if draw(st.booleans()):
        files = {name: content for name, content in files.items() if not name.startswith("greedy/")}
    return draw(make.changed_folder(files, *(name for name in files if name.startswith(("greedy/", "cmac/")))))


def report(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    written = page.write(folder, folder / "report")
    for path in [*written, leaderboard.write(folder, folder / "board.md")]:
        path.read_text(encoding="utf-8")


def image_list(files: make.Files, folder: Path) -> None:
    make.write(files, folder)
    data = located("chair", folder)
    rule = get("chair/512")
    asked = BENCHMARKS["chair"].read(Data(folder, image_list=folder / "list.txt", synonyms=data.synonyms), rule)
    same(len({one.key for one in asked}), len(asked), "images")


def _list_files() -> make.Files:
    return {**benchmark_files("chair"), "list.txt": b"COCO_val2014_000000000001.jpg\n2\n"}


def _folder(files, *names):
    return st.deferred(lambda: make.changed_folder(files() if callable(files) else files, *names))


READERS = (
    Reader("question file", _folder({"q.jsonl": lines(ASKED)}), question_file, 2),
    Reader("job gone on with", _folder(job_files), job),
    Reader("log", _folder({"log.jsonl": LOG}), logged),
    *(_of_benchmark(name) for name in BENCHMARKS),
    Reader("parquet", _folder(parquet_files), parquet_file),
    Reader("choices, TSV", _folder({"q.tsv": CHOICES.encode()}), choices_table),
    Reader("chair.pkl", _folder({"chair.pkl": pickle.dumps(SCORER)}), chair_pickle, 2),
    Reader("image list", _folder(_list_files, "list.txt"), image_list),
    Reader("scores", st.deferred(lambda: _runs()), report),
)
