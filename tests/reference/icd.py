"""ICD (arXiv 2403.18715) in plain NumPy float64, one sample at a time.

The contrast branch reads `words` in the place of the system prompt, pictures included: of the tokens `system` = (first,
one past the last). Without a system prompt the words stand in front, behind the BOS token, if `bos` is given and the
prompt opens with it. Without an image the method changes nothing.
"""

import numpy as np

from tests.reference.branch import Branch, cut, has_image, logits


def disturbed(ids, words, system=None, bos=None):
    """The prompt of the contrast branch."""
    if system is None:
        at = 1 if bos is not None and ids[0] == bos else 0
        system = (at, at)
    return [*ids[: system[0]], *words, *ids[system[1] :]]


def instruction(ids, words, variant, cls, sep):
    """What InstructBLIP's Q-Former reads for `ids`, [CLS] ... [SEP]: words before the question, or they alone."""
    assert ids[0] == cls and ids[-1] == sep
    return [cls, *words, *ids[1:-1], sep] if variant == "question" else [cls, *words, sep]


def run(weights, config, ids, pixels, tokens, words, system=None, bos=None, alpha=1.0, beta=0.1):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    other = disturbed(ids, words, system, bos)
    contrast = logits(weights, config, Branch(weights, config).run(other, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf)
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance
