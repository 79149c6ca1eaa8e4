"""Tiny benchmark folders and answer files, written as people have them."""

import dataclasses
import importlib
import json
from pathlib import Path

from lvlm_jax.evaluation import BENCHMARKS, get, rescore

SYNONYMS = """
person, girl, boy, man, people
dog, puppy
cat, kitten
tie, bow, bow tie
wine glass
teddy bear, teddybear
bear, panda
hot dog
toilet, urinal
chair, seat
motorcycle,  motor bike, motorbike
train, locomotive
airplane, jet
knife, knive
skis, ski
cell phone, mobile phone, iPhone
oven, stove top oven
"""
CATEGORIES = [line.split(",")[0] for line in SYNONYMS.splitlines() if line]


def write_lines(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def pope_row(number, image, label="yes", text="Is there a dog in the image?"):
    return {"question_id": number, "image": image, "text": text, "label": label}


def pope_folder(folder: Path, labels: dict[str, str], source: str = "coco") -> Path:
    """labels: split -> one letter a question, "y" or "n"; two questions an image."""
    for split, letters in labels.items():
        rows = [
            pope_row(i + 1, f"COCO_val2014_{i // 2:012d}.jpg", {"y": "yes", "n": "no"}[letter])
            for i, letter in enumerate(letters)
        ]
        write_lines(folder / source / f"{source}_pope_{split}.json", rows)
    return folder


def pope_answers(path: Path, texts) -> Path:
    return write_lines(path, [{"question_id": i + 1, "text": text} for i, text in enumerate(texts)])


def coco_folder(folder: Path, objects: dict[int, list[str]], captions: dict[int, list[str]]) -> Path:
    """objects: image id -> categories of its instances; captions: image id -> reference captions."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in objects]
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(CATEGORIES)]
    instances = [
        {"id": 10 * number + i, "image_id": number, "category_id": 1 + CATEGORIES.index(name)}
        for number, names in objects.items()
        for i, name in enumerate(names)
    ]
    texts = [
        {"id": 10 * number + i, "image_id": number, "caption": text}
        for number, listed in captions.items()
        for i, text in enumerate(listed)
    ]
    write_json(
        folder / "annotations" / "instances_val2014.json",
        {"images": images, "annotations": instances, "categories": categories},
    )
    write_json(folder / "annotations" / "captions_val2014.json", {"images": images, "annotations": texts})
    (folder / "synonyms.txt").write_text(SYNONYMS, encoding="utf-8")
    return folder


def mme_folder(folder: Path, tasks: dict[str, list[str]], nested: bool = False) -> Path:
    """tasks: subtask -> image names without ending; question 1 is answered yes, question 2 no."""
    for task, names in tasks.items():
        base = folder / "MME_Benchmark_release_version" / task
        texts, images = (base / "questions_answers_YN", base / "images") if nested else (base, base)
        texts.mkdir(parents=True)
        images.mkdir(exist_ok=True, parents=True)
        for name in names:
            text = "Is it so? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            (texts / f"{name}.txt").write_text(text, encoding="utf-8")
            (images / f"{name}.jpg").write_bytes(b"picture")
    return folder


ASSOCIATION = {"tree": ["trunk", "leaf"], "dog": ["puppy"], "cat": ["kitten"], "sky": [], "lake": ["water"]}


def amber_folder(folder: Path) -> Path:
    queries = [
        {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."},
        {"id": 2, "image": "AMBER_2.jpg", "query": "Describe this image."},
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"},
        {"id": 1006, "image": "AMBER_1.jpg", "query": "Are there three people in this image?"},
        {"id": 1007, "image": "AMBER_2.jpg", "query": "Is there a cat in this image?"},
        {"id": 1008, "image": "AMBER_2.jpg", "query": "Is there direct contact between the dog and the tree?"},
    ]
    notes = [
        {"id": 1, "type": "generative", "truth": ["tree", "sky"], "hallu": ["dog", "cat"]},
        {"id": 2, "type": "generative", "truth": ["dog"], "hallu": ["lake"]},
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1006, "type": "discriminative-attribute-number", "truth": "no"},
        {"id": 1007, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 1008, "type": "relation", "truth": "no"},
    ]
    write_json(folder / "data" / "query" / "query_all.json", queries)
    write_json(folder / "data" / "annotations.json", notes)
    write_json(folder / "data" / "relation.json", ASSOCIATION)
    (folder / "data" / "safe_words.txt").write_text("light\nwater\n", encoding="utf-8")
    return folder


def file_of(benchmark: str):
    """The test file of a benchmark, which has `sample(folder) -> Data` and the `PROTOCOLS` that it is fit for."""
    return importlib.import_module(f"tests.evaluation.benchmarks.test_{benchmark}")


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
    origin = {"model": model, "model_sha256": "ab" * 32, "dtype": "float32", "method": method, "seed": seed,
              "generation": {"batch_size": batch}}  # fmt: skip
    write_json(folder / f"{path.name}.run.json", origin)
    found = rescore.rescore(settings, data, [str(path)], resamples=200) | (more or {})
    rescore.write(found, folder)
    return found
