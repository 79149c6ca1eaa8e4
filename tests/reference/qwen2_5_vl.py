"""The decoder of Qwen2.5-VL (and Qwen2-VL) in plain NumPy float64, one sample at a time: multimodal positions.

The language model is LLaVA's (`tests/reference/llava.py`), whose functions this file uses; what is different is where
tokens stand. Image tokens come as embeddings, with rows and columns of tokens for each image.
"""

import dataclasses

import numpy as np

from tests.reference import llava, one_branch


def from_torch(model):
    """(weights, config) of a transformers model, in the form the references take."""
    weights, config = llava.from_torch(model)
    return weights, config | {"image_token_index": config["image_token_id"]}


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one sample.

    Attributes:
        embeddings: [N, E], their tokens in reading order as they enter the language model.
        grids: rows and columns of tokens of each.
    """

    embeddings: np.ndarray
    grids: tuple

    def places(self, is_image, gamma=1.0):
        """Positions [3, S] along time, height and width: ordinary ones, or those of CMAC's position calibration.

        A text token stands one step behind what is before it, on all axes. An image begins there; its tokens stand
        still in time and on their row and column, all measured from the image's first position in steps of 1/gamma.
        What follows begins behind its longer side, which has shrunk as much.
        """
        grids, here, positions, token = iter(self.grids), 0.0, [], 0
        while token < len(is_image):
            if not is_image[token]:
                positions.append((here, here, here))
                here += 1
                token += 1
                continue
            rows, columns = next(grids)
            for row in range(rows):
                for column in range(columns):
                    positions.append((here, here + row / gamma, here + column / gamma))
            here += max(rows, columns) / gamma
            token += rows * columns
        return np.array(positions).T

    def image_ids(self, config, input_ids):
        """0 for text, k for a token of the k-th image."""
        ids = np.zeros(len(input_ids), int)
        sizes = [rows * columns for rows, columns in self.grids]
        is_image = np.asarray(input_ids) == config["image_token_index"]
        ids[is_image] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
        return ids


def embed(weights, config, input_ids, images):
    """Embeddings [T, E] of one sample, image tokens replaced by those of `images` (None for text alone)."""
    x = weights[f"{llava.LANGUAGE}.embed_tokens.weight"][input_ids]
    is_image = np.asarray(input_ids) == config["image_token_index"]
    if is_image.any():
        x[is_image] = images.embeddings
    return x


def logits(weights, config, input_ids, images):
    """Logits [T, V] of one sample in one plain pass."""
    branch = one_branch.Branch(weights, config, None, embed, images.image_ids, images.places)
    return llava.head(weights, config, branch.prompt(input_ids, images)[-1])
