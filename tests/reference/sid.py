"""SID (arXiv 2408.02032) in plain NumPy float64, one sample at a time.

In every call the contrast branch ranks the image tokens by the weight, averaged over heads, that the last row of the
call puts on them in the layer before `first_layer`, and from `first_layer` on no row sees any but the `keep` of
lowest rank. Tokens outside a sliding window of the last row are not ranked and do not stay. Without an image the
method changes nothing.
"""

import numpy as np

from tests.reference import llava
from tests.reference.branch import Branch, cut, has_image, logits


def run(weights, config, ids, pixels, tokens, keep, alpha=0.5, beta=0.1, first_layer=2):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V].

    Then how clear the rankings were, and which columns were kept in each call.
    """
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    margins, choices = [np.inf], []

    def least_attended(layer, z, is_image):
        if layer < first_layer:
            return z
        attention = branch.attention[first_layer - 1][:, -1].mean(axis=0)
        last = len(is_image) - 1
        seen = llava.visible(config, first_layer - 1, np.array([last]), np.arange(last + 1))[0]
        ranked = sorted(np.flatnonzero(is_image & seen), key=lambda column: attention[column])
        if len(ranked) > keep:
            margins.append(attention[ranked[keep]] - attention[ranked[keep - 1]])
        if layer == first_layer:
            choices.append(tuple(sorted(int(column) for column in ranked[:keep])))
        hidden = is_image.copy()
        hidden[ranked[:keep]] = False
        masked = np.where(hidden, -np.inf, z)
        for row in np.flatnonzero(np.isneginf(masked[0]).all(axis=-1)):  # sees nothing: it sees itself
            own = len(is_image) - z.shape[1] + row
            masked[:, row, own] = z[:, row, own]
        return masked

    branch = Branch(weights, config, least_attended)
    contrast = logits(weights, config, branch.run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf), np.inf, choices
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance, min(margins), choices
