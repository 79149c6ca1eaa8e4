"""One branch of the plain NumPy LLaVA, one unpadded sample at a time: a prompt, then forced tokens.

Every branch runs its whole prompt by itself, whatever the library shares, with its own keys (unrotated) and values. A
method is an object with some of: `weights(call, z) -> w`, both [H, T, S], where z are the attention logits of the rows
of a call over all columns, also those that a row must not see (default `softmax_seen`); `attend(call, z)`, the heads'
outputs [H, T, D], in its place; `begin(call, embeddings)` before the first layer; `enter(call, hidden)` in every layer;
`mlp(call, x, added)`, which replaces what a feed-forward block adds to the stream, given what it read; `embed`, in
place of the model's;
`residual(call, hidden)`, which replaces the stream behind a layer.
"""

import dataclasses
import functools

import numpy as np

from tests.reference import llava


@dataclasses.dataclass
class Call:
    """One layer of one call: the prefill of a prompt, or the decoding of one token.

    Attributes:
        layer, depth: index from 0, and how many layers there are.
        prefill: whether the rows are the prompt's.
        rows: position of each row [T].
        image_id: per column [S] 0 for text, k for a token of the k-th image.
        seen: Bool[T, S], which columns a row sees.
        q, k: queries of the rows [H, T, D] and keys of all columns [K, S, D], both unrotated.
        values: of all columns [H, S, D], key heads repeated.
    """

    layer: int
    depth: int
    prefill: bool
    rows: np.ndarray
    image_id: np.ndarray
    seen: np.ndarray
    q: np.ndarray | None = None
    k: np.ndarray | None = None
    values: np.ndarray | None = None

    def images(self):
        """Column indices of each image, in reading order."""
        return [np.flatnonzero(self.image_id == k) for k in range(1, self.image_id.max() + 1)]


class Plain:
    """The method that does nothing."""


def softmax_seen(call, z):
    """Softmax of each row over the columns that it sees."""
    return llava.softmax(np.where(call.seen, z, -np.inf))


def image_ids(config, input_ids):
    """0 for text, k for a token of the k-th image; images that touch are told apart by their length."""
    is_image = np.asarray(input_ids) == config["image_token_index"]
    return np.where(is_image, 1 + (np.cumsum(is_image) - 1) // config["image_seq_length"], 0)


def in_a_row(is_image):
    """Positions [S] that count tokens."""
    return np.arange(len(is_image))


class Branch:
    """A sample under way. `attention[layer]` is what the softmax of the newest call gave, [H, T, S].

    `embed`, `image_ids` and `places` are those of the model; `places(is_image)` gives the positions of all tokens so
    far, [S] or one row for each axis.
    """

    def __init__(self, weights, config, method=None, embed=llava.embed, image_ids=image_ids, places=in_a_row):
        self.weights, self.config, self.method = weights, config, method
        self.embed, self.image_ids, self.places = getattr(method, "embed", embed), image_ids, places
        self.depth = config["text_config"]["num_hidden_layers"]
        self.cache, self.attention = [None] * self.depth, [None] * self.depth
        self.image_id = np.zeros(0, int)

    def call(self, hidden, image_id):
        """Appends rows [T, E], `image_id` [T]; their hidden states [1 + L, T, E], of which 0 is the input."""
        prefill = not len(self.image_id)
        self.image_id = np.concatenate([self.image_id, image_id])
        columns = np.arange(len(self.image_id))
        rows, positions, states = columns[-len(hidden) :], self.places(self.image_id > 0), [hidden]
        for layer in range(self.depth):
            seen = llava.visible(self.config, layer, rows, columns)
            call = Call(layer, self.depth, prefill, rows, self.image_id, seen)
            for hook in ("begin", "enter") if layer == 0 else ("enter",):
                getattr(self.method, hook, lambda call, hidden: None)(call, hidden)
            call.q, k, v = llava.project(self.weights, self.config, layer, hidden)
            if not prefill:
                k, v = (np.concatenate(pair, axis=1) for pair in zip(self.cache[layer], (k, v), strict=True))
            self.cache[layer] = k, v
            call.k, call.values = k, np.repeat(v, len(call.q) // len(v), axis=0)
            z = llava.scores(self.config["text_config"], call.q, k, positions[..., rows], positions)
            attended = getattr(self.method, "attend", self.attend)(call, z)
            edit = functools.partial(getattr(self.method, "mlp", lambda call, x, added: added), call)
            hidden = llava.finish_layer(self.weights, self.config, layer, hidden, attended, edit)
            hidden = getattr(self.method, "residual", lambda call, hidden: hidden)(call, hidden)
            states.append(hidden)
        return np.stack(states)

    def attend(self, call, z):
        w = self.attention[call.layer] = getattr(self.method, "weights", softmax_seen)(call, z)
        return np.einsum("HTS,HSD->HTD", w, call.values)

    def prompt(self, ids, pixels):
        return self.call(self.embed(self.weights, self.config, ids, pixels), self.image_ids(self.config, ids))

    def token(self, token):
        return self.call(self.embed(self.weights, self.config, [token], None), np.zeros(1, int))

    def run(self, ids, pixels, tokens):
        """The last row's hidden states [1 + len(tokens), 1 + L, E] of the prompt and of every forced token."""
        return np.stack([self.prompt(ids, pixels)[:, -1], *(self.token(token)[:, -1] for token in tokens)])


def run(weights, config, input_ids, pixel_values, tokens, method=None, **model):
    """Logits [1 + len(tokens), V]: of the next token after the prompt and after each of the forced `tokens`."""
    states = Branch(weights, config, method, **model).run(input_ids, pixel_values, tokens)
    return llava.head(weights, config, states[:, -1])


def without_images(config, ids):
    """The prompt with its image tokens left out."""
    return [token for token in ids if token != config["image_token_index"]]


def has_image(config, ids):
    return config["image_token_index"] in list(ids)


def log_softmax(z):
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def cut(main, combined, beta):
    """`combined` [T, V] where l >= max(l) + ln(beta), −inf elsewhere; and how far each l is from that threshold."""
    threshold = main.max(axis=-1, keepdims=True) + np.log(beta)
    return np.where(main >= threshold, combined, -np.inf), np.abs(main - threshold)
