"""Methods with a contrast branch in plain NumPy float64, one sample at a time, and VHR, whose second branch is a probe.

All return main, contrast, combined and distances to the plausibility cut, each [1 + len(tokens), V]; some, further, how
clear their choices were. Without an image they change nothing.
"""

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import Branch, cut, has_image, image_ids, log_softmax, run, softmax_seen, without_images


def contrasted(main, contrast, alpha, beta):
    """l + α (l - l~) inside the cut."""
    return main, contrast, *cut(main, main + alpha * (main - contrast), beta)


def alone(main, contrast=None):
    """A sample without an image."""
    return main, main if contrast is None else contrast, main, np.full_like(main, np.inf)


def kept_share(step):
    """VCD (arXiv 2311.16922): the square of the factor on the clean picture, the product of factors 0 ... step."""
    share = 1.0
    for i in range(step + 1):
        x = -6 + 12 * i / 999
        share *= 1 - (1 / (1 + np.exp(-x)) * (0.005 - 1e-5) + 1e-5)
    return share


def vcd(weights, config, ids, pixels, tokens, noise, alpha=1.0, beta=0.1, step=500):
    """The contrast branch reads pictures diffused for `step` steps; `noise(pixels)` has their shape."""
    main = run(weights, config, ids, pixels, tokens)
    if not has_image(config, ids):
        return alone(main)
    noisy = np.sqrt(kept_share(step)) * pixels + np.sqrt(1 - kept_share(step)) * noise(pixels)
    return contrasted(main, run(weights, config, ids, noisy, tokens), alpha, beta)


def disturbed(ids, words, system=None, bos=None):
    """ICD (arXiv 2403.18715): the prompt of the contrast branch.

    `words` stand in the place of the system prompt, of the tokens `system` = (first, one past the last). Without one
    they stand in front, behind the BOS token, if `bos` is given and the prompt opens with it.
    """
    if system is None:
        system = (1, 1) if bos is not None and ids[0] == bos else (0, 0)
    return [*ids[: system[0]], *words, *ids[system[1] :]]


def instruction(ids, words, variant, cls, sep):
    """What InstructBLIP's Q-Former reads for `ids`, [CLS] ... [SEP]: words before the question, or they alone."""
    assert ids[0] == cls and ids[-1] == sep
    return [cls, *words, *ids[1:-1], sep] if variant == "question" else [cls, *words, sep]


def icd(weights, config, ids, pixels, tokens, words, system=None, bos=None, alpha=1.0, beta=0.1):
    main = run(weights, config, ids, pixels, tokens)
    contrast = run(weights, config, disturbed(ids, words, system, bos), pixels, tokens)
    return contrasted(main, contrast, alpha, beta) if has_image(config, ids) else alone(main, contrast)


class LeastAttended:
    """SID's mask. In every call the image tokens are ranked by the weight, averaged over heads, that the last row of
    the call puts on them in the layer before `first_layer`; from `first_layer` on no row sees any but the `keep` of
    lowest rank. Tokens outside a sliding window of the last row are not ranked and do not stay.
    """

    def __init__(self, config, keep, first_layer):
        self.config, self.keep, self.first_layer = config, keep, first_layer
        self.margins, self.choices = [np.inf], []

    def weights(self, call, z):
        if call.layer >= self.first_layer:
            if call.layer == self.first_layer:
                self.rank(call)
            call.seen = call.seen & ~self.hidden
            blind = np.flatnonzero(~call.seen.any(axis=-1))
            call.seen[blind, call.rows[blind]] = True  # sees nothing: it sees itself
        w = softmax_seen(call, z)
        self.attention = w[:, -1].mean(axis=0)
        return w

    def rank(self, call):
        """By the attention of the layer before."""
        is_image = call.image_id > 0
        seen = llava.visible(self.config, call.layer - 1, call.rows[-1:], np.arange(len(is_image)))[0]
        ranked = sorted(np.flatnonzero(is_image & seen), key=lambda column: self.attention[column])
        if len(ranked) > self.keep:
            self.margins.append(self.attention[ranked[self.keep]] - self.attention[ranked[self.keep - 1]])
        self.choices.append(tuple(sorted(int(column) for column in ranked[: self.keep])))
        self.hidden = is_image
        self.hidden[ranked[: self.keep]] = False


def sid(weights, config, ids, pixels, tokens, keep, alpha=0.5, beta=0.1, first_layer=2):
    """SID (arXiv 2408.02032). Then how clear the rankings were, and which columns were kept in each call."""
    main, method = run(weights, config, ids, pixels, tokens), LeastAttended(config, keep, first_layer)
    contrast = run(weights, config, ids, pixels, tokens, method)
    if not has_image(config, ids):
        return *alone(main, contrast), np.inf, method.choices
    return *contrasted(main, contrast, alpha, beta), min(method.margins), method.choices


class Amplified:
    """PAI's edit: the last row of every call gains alpha |z| on image columns, in all heads of its layers."""

    def __init__(self, alpha, first_layer, layers):
        self.alpha, self.first_layer, self.layers = alpha, first_layer, layers

    def weights(self, call, z):
        if call.layer in self.layers if self.layers is not None else call.layer >= self.first_layer:
            z = z.copy()
            for column in np.flatnonzero(call.image_id > 0):
                z[:, -1, column] += self.alpha * np.abs(z[:, -1, column])
        return softmax_seen(call, z)


def pai(weights, config, ids, pixels, tokens, alpha=0.2, gamma=1.1, beta=0.1, first_layer=2, layers=None):
    """PAI (arXiv 2407.21771). Main is the edited branch; the other has neither images nor the edit."""
    main = run(weights, config, ids, pixels, tokens, Amplified(alpha, first_layer, layers))
    contrast = run(weights, config, without_images(config, ids), None, tokens)
    if not has_image(config, ids):
        return alone(main, contrast)
    s, u = log_softmax(main), log_softmax(contrast)
    return main, contrast, *cut(s, gamma * (s - u) + u, beta)


def m3id_step(main, contrast, t, decay=0.02, alpha_gate=0.9, beta=0.1, variant="paper"):
    """One step of logits [V]: combined, how far a token is from the cut (port), and the largest p from the gate."""
    g = np.exp(-decay * t)
    factor = (1 - g) / g
    if variant == "port":
        return *cut(main, main + factor * (main - contrast), beta), np.inf
    added = factor * (log_softmax(main) - log_softmax(contrast))
    surest = log_softmax(main).max()
    is_open = surest < np.log(alpha_gate)
    return main + is_open * added, np.full_like(main, np.inf), abs(surest - np.log(alpha_gate))


def m3id(weights, config, ids, pixels, tokens, **settings):
    """M3ID (arXiv 2403.14003) and RITUAL's port of it; and the distance to the gate.

    t counts the tokens generated before: 0 at the prompt. The port takes the difference of logits for that of
    log-probabilities: the same but for a number that all tokens of a step share.
    """
    main = run(weights, config, ids, pixels, tokens)
    contrast = run(weights, config, without_images(config, ids), None, tokens)
    if not has_image(config, ids):
        return *alone(main, contrast), np.inf
    steps = [m3id_step(main[t], contrast[t], t, **settings) for t in range(len(main))]
    combined, distances, gates = zip(*steps, strict=True)
    return main, contrast, np.stack(combined), np.stack(distances), min(gates)


def ritual(weights, config, ids, pixels, tokens, change, alpha=3.0, beta=0.1):
    """RITUAL (arXiv 2405.17821): the other branch reads changed pictures, `change(picture, number)`, and is added."""
    main = run(weights, config, ids, pixels, tokens)
    if not has_image(config, ids):
        return alone(main)
    changed = np.stack([np.asarray(change(picture, index)) for index, picture in enumerate(pixels)])
    contrast = run(weights, config, ids, changed, tokens)
    return main, contrast, *cut(main, main + alpha * contrast, beta)


def nolan(weights, config, ids, pixels, tokens, kappa=0.8):
    main = run(weights, config, ids, pixels, tokens)
    contrast = run(weights, config, without_images(config, ids), None, tokens)
    if not has_image(config, ids):
        return alone(main, contrast)
    p, u = log_softmax(main), log_softmax(contrast)
    g = (np.exp(p) * (p - u)).sum(-1, keepdims=True) + (np.exp(u) * (u - p)).sum(-1, keepdims=True)
    a = kappa * (np.tanh(1 / g) + 1)
    return main, contrast, (1 + a) * main - a * contrast, np.full_like(main, np.inf)


def changed_prompt(weights, config, embeddings, image_id, tokens):
    """Logits of a branch whose prompt is given as embeddings."""
    branch = Branch(weights, config)
    states = [branch.call(embeddings, image_id)[-1, -1], *(branch.token(token)[-1, -1] for token in tokens)]
    return llava.head(weights, config, np.stack(states))


def avisc(weights, config, ids, pixels, tokens, alpha=1.0, beta=0.1, gamma=0.5, lambda_=1.0):
    main = run(weights, config, ids, pixels, tokens)
    if not has_image(config, ids):
        return alone(main)
    embeddings, image_id = llava.embed(weights, config, ids, pixels), image_ids(config, ids)
    branch = Branch(weights, config)
    branch.call(embeddings, image_id)
    a = np.stack([w[:, -1, image_id > 0].mean(0) for w in branch.attention])
    mass = a.sum(-1) / a.sum()
    order = np.argsort(-mass)
    reached = np.cumsum(mass[order])
    mean = a[order[: 1 + (reached < gamma).sum()]].mean(0)
    threshold = mean.mean() + lambda_ * mean.std(ddof=1)
    margin = min(np.abs(reached - gamma).min(), np.abs(mean - threshold).min())
    embeddings[np.flatnonzero(image_id)[mean < threshold]] = 0
    contrast = changed_prompt(weights, config, embeddings, image_id, tokens)
    return *contrasted(main, contrast, alpha, beta), margin


def damro(weights, config, ids, pixels, tokens, keep, alpha=2.0, beta=0.1):
    main = run(weights, config, ids, pixels, tokens)
    if not has_image(config, ids):
        return alone(main)
    layer, vision = config["vision_feature_layer"], config["vision_config"]
    layer = np.arange(vision["num_hidden_layers"] + 1)[layer if isinstance(layer, int) else layer[-1]]
    image_id = image_ids(config, ids)
    kept, margin = image_id == 0, np.inf
    for own, picture in zip(np.split(np.flatnonzero(image_id), len(pixels)), pixels, strict=True):
        state = llava.tower_hidden_states(weights, config, picture)[layer - 1]
        name = f"{llava.TOWER}.encoder.layers.{layer - 1}"
        x = llava.layer_norm(weights, f"{name}.layer_norm1", state, vision["layer_norm_eps"])
        q, k = (llava.linear(weights, f"{name}.self_attn.{p}_proj", x) for p in "qk")
        attention = llava.softmax(q[0] @ k.T / np.sqrt(k.shape[-1]))[1:]
        order = np.argsort(-attention)
        margin = min(margin, attention[order[keep - 1]] - attention[order[keep]])
        kept[own[order[:keep]]] = True
    embeddings = llava.embed(weights, config, ids, pixels)[kept]
    contrast = changed_prompt(weights, config, embeddings, image_id[kept], tokens)
    return *contrasted(main, contrast, alpha, beta), margin


class Scaled:
    """VHR's edit: heads' outputs are multiplied by `scales[layer]` [H]; `heads[layer]` are the last row's before."""

    def __init__(self, scales):
        self.scales, self.heads = scales, {}

    def attend(self, call, z):
        heads = np.einsum("HTS,HSD->HTD", softmax_seen(call, z), call.values)
        self.heads[call.layer] = heads[:, -1]
        return heads * self.scales.get(call.layer, np.ones(len(heads)))[:, None, None]


def vhr(weights, config, ids, pixels, tokens, layers, alpha=2.0):
    """Logits [1 + len(tokens), V], and how clear the choice of heads was; both prompts are run anew for each layer."""
    scales, margin = {}, np.inf
    for layer in layers if has_image(config, ids) else ():
        seeing, blind = Scaled(scales), Scaled(scales)
        run(weights, config, ids, pixels, (), seeing)
        run(weights, config, without_images(config, ids), None, (), blind)
        vhd = ((seeing.heads[layer] - blind.heads[layer]) ** 2).sum(-1)
        size = (blind.heads[layer] ** 2).sum(-1)
        margin = min(margin, *(np.abs(x - x.mean() - x.std()).min() for x in (vhd, size)))
        vhd = np.where((vhd > vhd.mean() + vhd.std()) & (size > size.mean() + size.std()), 0, vhd)
        scales[layer] = np.where(vhd > np.median(vhd), alpha, 1.0)
    return run(weights, config, ids, pixels, tokens, Scaled(scales)), margin
