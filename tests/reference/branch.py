"""One branch of one sample in plain NumPy float64: a prompt, then forced tokens, with its own keys and values.

Every branch runs its whole prompt by itself, whatever the library shares. Keys are kept unrotated.
"""

import numpy as np

from tests.reference import llava


class Branch:
    """A language model with hooks.

    `edit(layer, z, is_image)` gets masked attention logits [H, T, S] and returns others; `mlp(layer, added)` gets
    what a feed-forward block is about to add to the stream [T, E] and returns another; `residual(layer, hidden)`
    gets the residual stream [T, E] behind a layer and returns another. `attention[layer]` is what the softmax of
    the running call gave, [H, T, S].
    """

    def __init__(self, weights, config, edit=None, residual=None, mlp=lambda layer, added: added):
        self.weights, self.config, self.edit, self.residual, self.mlp = weights, config, edit, residual, mlp
        self.depth = config["text_config"]["num_hidden_layers"]
        self.keys, self.values = [None] * self.depth, [None] * self.depth
        self.attention = [None] * self.depth
        self.is_image = np.zeros(0, bool)

    def call(self, embeddings, is_image):
        """Appends rows [T, E] of which `is_image` [T] are image tokens; hidden states [1 + L, T, E], 0 the input."""
        text = self.config["text_config"]
        self.is_image = np.concatenate([self.is_image, is_image])
        length = len(self.is_image)
        columns = np.arange(length)
        rows = columns[length - len(embeddings) :]
        states = [embeddings]
        for layer in range(self.depth):
            hidden = states[-1]
            q, k, v = llava.project(self.weights, self.config, layer, hidden)
            if self.keys[layer] is not None:
                k = np.concatenate([self.keys[layer], k], axis=1)
                v = np.concatenate([self.values[layer], v], axis=1)
            self.keys[layer], self.values[layer] = k, v
            seen = llava.visible(self.config, layer, rows, columns)
            z = np.where(seen, llava.scores(text, q, k, rows, columns), -np.inf)
            if self.edit is not None:
                z = self.edit(layer, z, self.is_image)
            w = self.attention[layer] = llava.softmax(z)
            attended = np.einsum("HTS,HSD->HTD", w, np.repeat(v, q.shape[0] // v.shape[0], axis=0))
            hidden = llava.finish_layer(
                self.weights, self.config, layer, hidden, attended, lambda x, added, layer=layer: self.mlp(layer, added)
            )
            states.append(hidden if self.residual is None else self.residual(layer, hidden))
        return np.stack(states)

    def run(self, ids, pixels, tokens):
        """The last row's hidden states [1 + len(tokens), 1 + L, E] of the prompt and of every forced token."""
        is_image = np.asarray(ids) == self.config["image_token_index"]
        states = [self.call(llava.embed(self.weights, self.config, ids, pixels), is_image)[:, -1]]
        for token in tokens:
            rows = llava.embed(self.weights, self.config, [token], None)
            states.append(self.call(rows, np.zeros(1, bool))[:, -1])
        return np.stack(states)


def logits(weights, config, hidden, norm=True):
    """Next-token logits [..., V] of hidden states [..., E], with or without the final norm."""
    if norm:
        return llava.head(weights, config, hidden)
    return hidden @ weights.get("lm_head.weight", weights[f"{llava.LANGUAGE}.embed_tokens.weight"]).T


def without_images(config, ids):
    """The prompt with its image tokens left out."""
    return [token for token in ids if token != config["image_token_index"]]


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def cut(main, combined, beta):
    """`combined` [T, V] where l >= max(l) + ln(beta), −inf elsewhere; and how far each l is from that threshold."""
    threshold = main.max(axis=-1, keepdims=True) + np.log(beta)
    return np.where(main >= threshold, combined, -np.inf), np.abs(main - threshold)


def has_image(config, ids):
    return config["image_token_index"] in list(ids)
