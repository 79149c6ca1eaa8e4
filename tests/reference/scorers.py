"""The benchmarks' figures, written straight down: plain loops over plain rows, nothing shared with the package.

Rows are dictionaries. Shares are between 0 and 1; what cannot be divided is None.
"""


def share(part, whole):
    return part / whole if whole else None


def average(values):
    return None if any(value is None for value in values) else sum(values) / len(values)


def pope_parse(parser, text, label):
    if parser == "official":
        if "." in text:
            text = text[: text.index(".")]
        for word in text.replace(",", "").split(" "):
            if word in ("No", "no", "not"):
                return "no"
        return "yes"
    if parser == "opera":
        for word in text.replace(".", "").replace(",", "").split(" "):
            if word in ("No", "NO", "no", "not") or word[-3:] == "n't":
                return "no"
        return "yes"
    if parser == "vcd":
        found = text.lower().strip().find(label) >= 0
        if label == "yes":
            return "yes" if found else "no"
        return "no" if found else "yes"
    if parser == "lmms-eval":
        word = text.lower().strip()
        return word if word == "yes" or word == "no" else None
    words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in text.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def yes_no_figures(said, labels, positive="yes", unparsed_is_missed=True):
    right = hits = claimed = positives = unparsed = 0
    for answer, label in zip(said, labels, strict=True):
        right += answer == label
        claimed += answer == positive
        hits += answer == positive and label == positive
        unparsed += answer is None
        positives += label == positive and (answer is not None or unparsed_is_missed)
    n = len(labels)
    return {
        "accuracy": share(right, n),
        "precision": share(hits, claimed),
        "recall": share(hits, positives),
        "F1": share(2 * hits, claimed + positives),
        f"{positive} ratio": share(claimed, n),
        "unparsed": share(unparsed, n),
    }


def pope(rows, parser):
    """rows: {split, text, label}."""
    figures = {}
    splits = []
    for row in rows:
        if row["split"] not in splits:
            splits.append(row["split"])
    for split in splits:
        chosen = [row for row in rows if row["split"] == split]
        said = [pope_parse(parser, row["text"], row["label"]) for row in chosen]
        found = yes_no_figures(said, [row["label"] for row in chosen], "yes", parser != "lmms-eval")
        for name, value in found.items():
            figures[f"{split}: {name}"] = value
    if len(splits) > 1:
        for name in ("accuracy", "precision", "recall", "F1", "yes ratio", "unparsed"):
            figures[f"mean: {name}"] = average([figures[f"{split}: {name}"] for split in splits])
    plain = [pope_parse("strict", row["text"], "") for row in rows]
    figures["strict yes ratio"] = share(plain.count("yes"), len(rows))
    figures["strict unparsed"] = share(plain.count(None), len(rows))
    return figures


def chair(rows):
    """rows: {mentions: [category, ...] in order, truth: set}."""
    bad_captions = bad = mentions = objects = covered = named = 0
    coverage = []
    for row in rows:
        wrong = [name for name in row["mentions"] if name not in row["truth"]]
        bad_captions += len(wrong) > 0
        bad += len(wrong)
        mentions += len(row["mentions"])
        objects += len(row["truth"])
        covered += len(set(row["mentions"]) & row["truth"])
        named += len(set(row["mentions"]))
        if row["truth"]:
            coverage.append(len(set(row["mentions"]) & row["truth"]) / len(row["truth"]))
    instances, recall, precision = share(bad, mentions), share(covered, objects), share(covered, named)

    def harmonic(first):
        if first is None or recall is None:
            return None
        return 2 * first * recall / (first + recall) if first + recall else 0.0

    return {
        "C_S": share(bad_captions, len(rows)),
        "C_I": instances,
        "recall": recall,
        "F1": harmonic(None if instances is None else 1 - instances),
        "F1 (distinct)": harmonic(precision),
        "coverage": share(sum(coverage), len(coverage)),
    }


def mme_parse(text):
    head = text[:4].lower()
    if "yes" in head:
        return "yes"
    return "no" if "no" in head else None


def mme(rows):
    """rows: {task, image, label, text}, two of each image."""
    figures = {}
    scores = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        by_image = {}
        for row in rows:
            if row["task"] == task:
                by_image.setdefault(row["image"], []).append(mme_parse(row["text"]) == row["label"])
        rights = [right for pair in by_image.values() for right in pair]
        accuracy = sum(rights) / len(rights)
        both = sum(1 for pair in by_image.values() if pair == [True, True]) / len(by_image)
        figures[f"{task}: accuracy"], figures[f"{task}: accuracy+"] = accuracy, both
        figures[f"{task}: score"] = scores[task] = 100 * accuracy + 100 * both
    if all(task in scores for task in ("existence", "count", "position", "color")):
        figures["hallucination"] = sum(scores[task] for task in ("existence", "count", "position", "color"))
    return figures


def amber_description(nouns, truth, temptations, association, safe):
    """(hallucinated nouns, all nouns, objects covered, temptations named), nouns matched exactly."""

    def owner(noun, words):
        for i in range(len(words)):
            if noun in association[words[i]]:
                return i
        return words.index(noun) if noun in words else -1

    wrong, covered, tempted = 0, set(), set()
    for noun in nouns:
        if noun in safe:
            continue
        if owner(noun, truth) >= 0:
            covered.add(owner(noun, truth))
            continue
        if owner(noun, temptations) >= 0:
            tempted.add(owner(noun, temptations))
        wrong += 1
    return wrong, len(nouns), len(covered), len(tempted)


def letters(rows):
    """rows: {said: letter or None, label}."""
    return {
        "accuracy": share(sum(row["said"] == row["label"] for row in rows), len(rows)),
        "unparsed": share(sum(row["said"] is None for row in rows), len(rows)),
    }


def mcnemar(only_first, only_second):
    """Two-sided exact p, by Pascal's triangle."""
    n = only_first + only_second
    row = [1]
    for _ in range(n):
        row = [1] + [row[i] + row[i + 1] for i in range(len(row) - 1)] + [1]
    tail = sum(row[: min(only_first, only_second) + 1])
    return min(1.0, 2 * tail / 2**n)
