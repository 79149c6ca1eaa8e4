"""NoLan, AvisC, DAMRO and VHR in plain NumPy float64, one sample at a time. Without an image they change nothing."""

import numpy as np

from tests.reference import llava
from tests.reference.branch import Branch, cut, has_image, log_softmax, logits, without_images


def nolan(weights, config, ids, pixels, tokens, kappa=0.8):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    contrast = logits(weights, config, Branch(weights, config).run(without_images(config, ids), None, tokens)[:, -1])
    if not has_image(config, ids):
        return main, contrast, main, np.full_like(main, np.inf)
    p, u = log_softmax(main), log_softmax(contrast)
    g = (np.exp(p) * (p - u)).sum(-1, keepdims=True) + (np.exp(u) * (u - p)).sum(-1, keepdims=True)
    a = kappa * (np.tanh(1 / g) + 1)
    return main, contrast, (1 + a) * main - a * contrast, np.full_like(main, np.inf)


def avisc(weights, config, ids, pixels, tokens, alpha=1.0, beta=0.1, gamma=0.5, lambda_=1.0):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]; how clear the choices were."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, main, main, np.full_like(main, np.inf)
    is_image = np.asarray(ids) == config["image_token_index"]
    embeddings = llava.embed(weights, config, ids, pixels)
    branch = Branch(weights, config)
    branch.call(embeddings, is_image)
    a = np.stack([w[:, -1, is_image].mean(0) for w in branch.attention])
    mass = a.sum(-1) / a.sum()
    order = np.argsort(-mass)
    reached = np.cumsum(mass[order])
    chosen = order[: 1 + (reached < gamma).sum()]
    mean = a[chosen].mean(0)
    threshold = mean.mean() + lambda_ * mean.std(ddof=1)
    margin = min(np.abs(reached - gamma).min(), np.abs(mean - threshold).min())
    embeddings[np.flatnonzero(is_image)[mean < threshold]] = 0
    other = Branch(weights, config)
    states = [other.call(embeddings, is_image)[-1, -1]]
    states += [other.call(llava.embed(weights, config, [t], None), np.zeros(1, bool))[-1, -1] for t in tokens]
    contrast = logits(weights, config, np.stack(states))
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance, margin


def damro(weights, config, ids, pixels, tokens, keep, alpha=2.0, beta=0.1):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]; how clear the choices were."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, main, main, np.full_like(main, np.inf)
    layer = config["vision_feature_layer"]
    layer = np.arange(config["vision_config"]["num_hidden_layers"] + 1)[layer if isinstance(layer, int) else layer[-1]]
    is_image = np.asarray(ids) == config["image_token_index"]
    kept, margin = ~is_image, np.inf
    columns = np.split(np.flatnonzero(is_image), len(pixels))
    for own, picture in zip(columns, pixels, strict=True):
        state = llava.tower_hidden_states(weights, config, picture)[layer - 1]
        name = f"{llava.TOWER}.encoder.layers.{layer - 1}"
        x = llava.layer_norm(weights, f"{name}.layer_norm1", state, config["vision_config"]["layer_norm_eps"])
        q, k = (llava.linear(weights, f"{name}.self_attn.{p}_proj", x) for p in "qk")
        attention = llava.softmax(q[0] @ k.T / np.sqrt(k.shape[-1]))[1:]
        order = np.argsort(-attention)
        margin = min(margin, attention[order[keep - 1]] - attention[order[keep]])
        kept[own[order[:keep]]] = True
    other = Branch(weights, config)
    embeddings = llava.embed(weights, config, ids, pixels)[kept]
    states = [other.call(embeddings, is_image[kept])[-1, -1]]
    states += [other.call(llava.embed(weights, config, [t], None), np.zeros(1, bool))[-1, -1] for t in tokens]
    contrast = logits(weights, config, np.stack(states))
    combined, distance = cut(main, main + alpha * (main - contrast), beta)
    return main, contrast, combined, distance, margin


class Scaled(Branch):
    """A branch whose heads' outputs are multiplied by `scales[layer]` [H] in some layers."""

    def __init__(self, weights, config, scales):
        super().__init__(weights, config)
        self.scales = scales

    def layer(self, layer, hidden, rows):
        """Heads' outputs [H, T, D] before they are scaled; keys and values of the rows are appended."""
        text, columns = self.config["text_config"], np.arange(rows[-1] + 1)
        q, k, v = llava.project(self.weights, self.config, layer, hidden)
        if self.keys[layer] is not None:
            k = np.concatenate([self.keys[layer], k], axis=1)
            v = np.concatenate([self.values[layer], v], axis=1)
        self.keys[layer], self.values[layer] = k, v
        z = llava.scores(text, q, k, rows, columns)
        w = llava.softmax(np.where(llava.visible(self.config, layer, rows, columns), z, -np.inf))
        return np.einsum("HTS,HSD->HTD", w, np.repeat(v, q.shape[0] // v.shape[0], axis=0))

    def finish(self, layer, hidden, heads):
        if layer in self.scales:
            heads = heads * self.scales[layer][:, None, None]
        return llava.finish_layer(self.weights, self.config, layer, hidden, heads)


def vhr(weights, config, ids, pixels, tokens, layers, alpha=2.0):
    """Logits [1 + len(tokens), V], and how clear the choice of heads was."""
    seeing, blind = Scaled(weights, config, {}), Scaled(weights, config, {})
    states = [llava.embed(weights, config, ids, pixels)]
    states.append(llava.embed(weights, config, without_images(config, ids), None))
    rows, margin = [np.arange(len(state)) for state in states], np.inf
    scales = {}
    for layer in range(seeing.depth):
        heads = [one.layer(layer, *each) for one, *each in zip((seeing, blind), states, rows, strict=True)]
        if layer in layers and has_image(config, ids):
            vhd = ((heads[0][:, -1] - heads[1][:, -1]) ** 2).sum(-1)
            size = (heads[1][:, -1] ** 2).sum(-1)
            margin = min(margin, *(np.abs(x - x.mean() - x.std()).min() for x in (vhd, size)))
            vhd = np.where((vhd > vhd.mean() + vhd.std()) | (size > size.mean() + size.std()), 0, vhd)
            scales[layer] = np.where(vhd > np.median(vhd), alpha, 1.0)
        seeing.scales = blind.scales = scales
        pairs = zip((seeing, blind), states, heads, strict=True)
        states = [one.finish(layer, state, own) for one, state, own in pairs]
    last, place, results = states[0], rows[0][-1], [logits(weights, config, states[0][-1])]
    for token in tokens:
        place += 1
        last = llava.embed(weights, config, [token], None)
        for layer in range(seeing.depth):
            last = seeing.finish(layer, last, seeing.layer(layer, last, np.array([place])))
        results.append(logits(weights, config, last[-1]))
    return np.stack(results), margin
