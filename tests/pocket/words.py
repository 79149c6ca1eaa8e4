"""Reads the world's sentences back into categories: written apart from the code that makes them."""

import re

from lvlm_jax.pocket.catalogue import CATEGORIES

IRREGULAR = {"people": "person", "buses": "bus", "knives": "knife", "sandwiches": "sandwich", "couches": "couch",
             "mice": "mouse", "wine glasses": "wine glass", "toothbrushes": "toothbrush"}  # fmt: skip
FORMS = {name: name for name in CATEGORIES} | {name + "s": name for name in CATEGORIES} | IRREGULAR
# Longest first, so that "hot dog" is not a dog and "teddy bear" no bear.
PATTERN = re.compile(r"\b(" + "|".join(sorted(map(re.escape, FORMS), key=len, reverse=True)) + r")\b")


def categories_in(text):
    """Categories mentioned in `text`, in order; the colour orange is not the fruit."""
    return [FORMS[word] for word in PATTERN.findall(text.lower())]
