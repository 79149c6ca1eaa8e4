"""One branch of the plain NumPy LLaVA whose attention weights a method may edit; one unpadded sample at a time.

A method is an object with `weights(call, z) -> w`, both [H, T, S]: `z` are the attention logits of the rows of this
call over all columns, also those that a row must not see. It may have `begin(call, embeddings)`, which is called
before the first layer with what enters it; `enter(call, hidden)`, called in every layer; `mlp(call, x, added)`, which
replaces what a feed-forward block adds to the stream, given what it read. `softmax_seen` is what the plain model does.
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
        values: of all columns [H, S, D], key heads repeated.
    """

    layer: int
    depth: int
    prefill: bool
    rows: np.ndarray
    image_id: np.ndarray
    seen: np.ndarray
    values: np.ndarray | None = None

    def images(self):
        """Column indices of each image, in reading order."""
        return [np.flatnonzero(self.image_id == k) for k in range(1, self.image_id.max() + 1)]


class Plain:
    """The method that does nothing."""

    def weights(self, call, z):
        return softmax_seen(call, z)


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


def run(
    weights, config, input_ids, pixel_values, tokens, method, embed=llava.embed, image_ids=image_ids, places=in_a_row
):
    """Logits [1 + len(tokens), V]: of the next token after the prompt and after each of the forced `tokens`.

    `embed`, `image_ids` and `places` are those of the model; `places(is_image)` gives the positions of all tokens so
    far, [S] or one row for each axis.
    """
    text = config["text_config"]
    depth = text["num_hidden_layers"]
    keys, values = [None] * depth, [None] * depth
    image_id = image_ids(config, input_ids)
    hidden = embed(weights, config, input_ids, pixel_values)
    results = []
    for step in range(len(tokens) + 1):
        if step:
            hidden = embed(weights, config, [tokens[step - 1]], None)
            image_id = np.append(image_id, 0)
        columns = np.arange(len(image_id))
        rows = columns[len(columns) - len(hidden) :]
        positions = places(image_id > 0)
        for layer in range(depth):
            call = Call(layer, depth, step == 0, rows, image_id, llava.visible(config, layer, rows, columns))
            if layer == 0 and hasattr(method, "begin"):
                method.begin(call, hidden)
            if hasattr(method, "enter"):
                method.enter(call, hidden)
            q, k, v = llava.project(weights, config, layer, hidden)
            if step:
                k = np.concatenate([keys[layer], k], axis=1)
                v = np.concatenate([values[layer], v], axis=1)
            keys[layer], values[layer] = k, v
            v = call.values = np.repeat(v, q.shape[0] // v.shape[0], axis=0)
            w = method.weights(call, llava.scores(text, q, k, positions[..., rows], positions))
            edit = functools.partial(method.mlp, call) if hasattr(method, "mlp") else lambda x, added: added
            hidden = llava.finish_layer(weights, config, layer, hidden, np.einsum("HTS,HSD->HTD", w, v), edit)
        results.append(llava.head(weights, config, hidden[-1:])[0])
    return np.stack(results)
