"""Tiny benchmark folders and answer files in their published forms, and their scores."""

import dataclasses
import importlib
import json
from pathlib import Path

from lvlm_jax.evaluation import BENCHMARKS, Data, get, rescore

CATEGORIES = ["person", "dog", "cat", "tie", "wine glass", "teddy bear", "bear", "hot dog", "toilet", "chair"]
CATEGORIES += ["motorcycle", "train", "airplane", "knife", "skis", "cell phone", "oven"]
OTHER_WORDS = {
    "person": ", girl, boy, man, people", "dog": ", puppy", "cat": ", kitten", "tie": ", bow, bow tie", "skis": ", ski",
    "teddy bear": ", teddybear", "bear": ", panda", "toilet": ", urinal", "chair": ", seat", "train": ", locomotive",
    "motorcycle": ",  motor bike, motorbike", "airplane": ", jet", "knife": ", knive", "oven": ", stove top oven",
    "cell phone": ", mobile phone, iPhone",
}  # fmt: skip
SYNONYMS = "\n" + "".join(f"{name}{OTHER_WORDS.get(name, '')}\n" for name in CATEGORIES)


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def write_lines(path: Path, rows) -> Path:
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, value) -> Path:
    return write_text(path, json.dumps(value))


def write_pictures(folder: Path, *names: str) -> None:
    for name in names:
        write_text(folder / name, "picture")


def pope_row(number, image, label="yes", text="Is there a dog in the image?"):
    return {"question_id": number, "image": image, "text": text, "label": label}


def pope_folder(folder: Path, labels: dict[str, str], source: str = "coco") -> Path:
    """labels: split -> one letter a question, "y" or "n"; two questions an image."""
    for split, letters in labels.items():
        words = [{"y": "yes", "n": "no"}[letter] for letter in letters]
        rows = [pope_row(i + 1, f"COCO_val2014_{i // 2:012d}.jpg", word) for i, word in enumerate(words)]
        write_lines(folder / source / f"{source}_pope_{split}.json", rows)
    return folder


def pope_answers(path: Path, texts) -> Path:
    return write_lines(path, [{"question_id": i + 1, "text": text} for i, text in enumerate(texts)])


def coco_folder(folder: Path, objects: dict[int, list[str]], captions: dict[int, list[str]]) -> Path:
    """objects: image id -> categories of its instances; captions: image id -> reference captions."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in objects]

    def notes(listed: dict[int, list[str]], field: str, value) -> list[dict]:
        pairs = [(number, i, one) for number, ones in listed.items() for i, one in enumerate(ones)]
        return [{"id": 10 * number + i, "image_id": number, field: value(one)} for number, i, one in pairs]

    instances = notes(objects, "category_id", lambda name: 1 + CATEGORIES.index(name))
    kinds = {"categories": [{"id": 1 + i, "name": name} for i, name in enumerate(CATEGORIES)]}
    texts = {"images": images, "annotations": notes(captions, "caption", str)}
    write_json(folder / "annotations/captions_val2014.json", texts)
    write_json(folder / "annotations/instances_val2014.json", {"images": images, "annotations": instances} | kinds)
    write_text(folder / "synonyms.txt", SYNONYMS)
    return folder


def mme_folder(folder: Path, tasks: dict[str, list[str]], nested: bool = False) -> Path:
    """tasks: subtask -> image names without ending; question 1 is answered yes, question 2 no."""
    text = "Is it so? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
    for task, names in tasks.items():
        base = folder / "MME_Benchmark_release_version" / task
        texts, images = (base / "questions_answers_YN", base / "images") if nested else (base, base)
        for name in names:
            write_text(texts / f"{name}.txt", text)
            write_pictures(images, f"{name}.jpg")
    return folder


ASSOCIATION = {"tree": ["trunk", "leaf"], "dog": ["puppy"], "cat": ["kitten"], "sky": [], "lake": ["water"]}
AMBER = [
    (1, 1, "Describe this image.", "generative", {"truth": ["tree", "sky"], "hallu": ["dog", "cat"]}),
    (2, 2, "Describe this image.", "generative", {"truth": ["dog"], "hallu": ["lake"]}),
    (1005, 1, "Is the sky sunny in this image?", "discriminative-attribute-state", {"truth": "yes"}),
    (1006, 1, "Are there three people in this image?", "discriminative-attribute-number", {"truth": "no"}),
    (1007, 2, "Is there a cat in this image?", "discriminative-hallucination", {"truth": "no"}),
    (1008, 2, "Is there direct contact between the dog and the tree?", "relation", {"truth": "no"}),
]


def amber_folder(folder: Path) -> Path:
    queries = [{"id": one, "image": f"AMBER_{image}.jpg", "query": text} for one, image, text, *_ in AMBER]
    write_json(folder / "data/query/query_all.json", queries)
    write_json(folder / "data/annotations.json", [{"id": one[0], "type": one[3], **one[4]} for one in AMBER])
    write_json(folder / "data/relation.json", ASSOCIATION)
    write_text(folder / "data/safe_words.txt", "light\nwater\n")
    return folder


def file_of(benchmark: str):
    """The test module of a benchmark, with `sample(folder) -> Data` and the `PROTOCOLS` that it supports."""
    return importlib.import_module(f"tests.evaluation.benchmarks.test_{benchmark}")


def read(protocol: str, folder: Path, need_images: bool = False, **where):
    """The questions that a folder has for a protocol."""
    settings = get(protocol)
    return BENCHMARKS[settings.benchmark].read(Data(folder, **where), settings, need_images)


def scored(protocol: str, questions, texts):
    """(figures, whole scores) of texts by the questions' ids or keys, of one for each question, or of one for all."""
    settings = get(protocol)
    if isinstance(texts, str):
        texts = [texts] * len(questions)
    if isinstance(texts, dict):
        texts = [texts[one.id if one.id in texts else one.key] for one in questions]
    answers = {question.key: text for question, text in zip(questions, texts, strict=True)}
    scores = BENCHMARKS[settings.benchmark].score(questions, answers, settings)
    return {name: float(value) for name, value in scores.values().items()}, scores


def scored_run(
    folder, data, said, method=None, protocol="pope/strict", model="llava", seed=0, batch=16, more=None, **changes
):
    """A folder as an evaluation leaves it: answers, their record, a log, scores. Returns the scores."""
    settings = dataclasses.replace(get(protocol), **changes)
    benchmark = BENCHMARKS[settings.benchmark]
    questions = benchmark.read(data, settings)
    texts = {question.key: text for question, text in zip(questions, said, strict=True)}
    path = folder / benchmark.answers.name
    benchmark.answers.write(path, questions, texts, settings)
    origin = {"model": model, "model_sha256": "ab" * 32, "dtype": "float32", "method": method, "seed": seed}
    write_json(folder / f"{path.name}.run.json", origin | {"generation": {"batch_size": batch}})
    found = rescore.rescore(settings, data, [str(path)], resamples=200) | (more or {})
    rescore.write(found, folder)
    return found
