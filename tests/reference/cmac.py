"""CMAC (IMD + CMPC, arXiv 2501.01926) in plain NumPy float64, one sample at a time.

Two complete branches are run, and nothing is shared between them: the reference is also the full re-run that a shared
prefix has to equal. The threshold of IMD belongs to a layer and a call (the prefill of the whole prompt, or the
decoding of one token), so the keys and values of earlier calls are kept as those calls made them.

Readings of the text that are open to choice:
- several images: image columns are the tokens of all images, E is the index after the last of them;
- statistics are taken over query heads; key and value heads are repeated to them;
- a column that a row cannot see (sliding window) takes no part in its statistics;
- a sample without an image is left alone: both branches are the plain model;
- without IMD there is nothing to contrast with, so no plausibility cut either: combined is main;
- the gate: s_t is taken from the main branch's logits after CMPC and before softmax, at the last row of call t (the
  prefill is step 0), over the image columns; alpha is 0 where s_t lies below the mean of 30 steps, itself included
  (so never at step 0): of the first 30 so far under gate="first", of the newest 30 under gate="last". No variant has
  a gate of itself.
"""

import dataclasses

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import Branch

GATE_WINDOW = 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """The method's strengths and switches, under the names METHODS gives them."""

    alpha: float = 3.0
    beta: float = 0.2
    gamma: float | None = None  # 2 in the paper, 3 in the authors' LLaVA code
    imd: bool = True
    cmpc: bool = True
    distort: str = "value_mask"  # | "attention_mask" | "value_noise"
    variant: str = "paper"  # | "code"
    gate: str | None = None  # | "first" | "last"

    @property
    def scale(self):
        """gamma, by default that of the variant."""
        return self.gamma if self.gamma is not None else {"paper": 2.0, "code": 3.0}[self.variant]


@dataclasses.dataclass
class Result:
    """One row per call (prefill, then every forced token), V columns; and how safe the comparisons were."""

    main: np.ndarray
    contrast: np.ndarray
    combined: np.ndarray
    alphas: list  # alpha used at each call
    gate: list  # s_t of each call
    margin: float  # smallest |X − theta| met anywhere, so that a float32 run takes the same decisions
    gate_margin: float  # smallest |s_t − mean|, over t ≥ 1


def calibrated_positions(is_image, gamma=1.0):
    """P^c(p) = p − (1 − 1/gamma)·c(p) for every position; c(p) counts the image tokens strictly before p."""
    before = np.concatenate([[0], np.cumsum(is_image)[:-1]])
    return np.arange(len(is_image)) - (1 - 1 / gamma) * before


def post_image_start(is_image):
    """E: the index after the last image token (0 without one)."""
    return int(np.flatnonzero(is_image)[-1]) + 1 if is_image.any() else 0


def calibrated_scores(text, q, k, rows, is_image, settings, places=calibrated_positions):
    """Attention logits [H, T, S] after CMPC, and the block Bool[T, S] = rows ≥ E × image columns.

    `q` [H, T, D] are the tokens `rows` [T], `k` [K, S, D] all tokens so far, both unrotated. `places` gives the
    calibrated positions of all tokens, [S] or one row for each axis; with a gamma of 1 those are the ordinary ones.
    """
    block = (rows >= post_image_start(is_image))[:, None] & is_image[None, :]
    ordinary = places(is_image, 1.0)
    z = llava.scores(text, q, k, ordinary[..., rows], ordinary)
    if settings.cmpc:
        moved = places(is_image, settings.scale)
        z = np.where(block, llava.scores(text, q, k, moved[..., rows], moved), z)
    return z, block


def distorted_output(z, v, block, is_image, settings, noise=None):
    """IMD on the masked logits `z` [H, T, S] (−inf where hidden) and values `v` [H, S, D].

    Returns the attention output [H, T, D] and the smallest |X − theta|. `noise` [H, image tokens, D] replaces
    the values of masked columns under distort="value_noise".
    """
    entries = z[:, block]
    if entries.size == 0:
        return np.einsum("HTS,HSD->HTD", llava.softmax(z), v), np.inf
    theta = entries.mean()
    masked = block[None] & (z > theta)
    margin = np.abs(entries - theta).min()
    if settings.distort == "attention_mask":
        return np.einsum("HTS,HSD->HTD", llava.softmax(np.where(masked, -np.inf, z)), v), margin
    w = llava.softmax(z)
    replacement = np.zeros_like(v)  # only its image columns are ever read
    if settings.distort == "value_noise":
        replacement[:, is_image] = noise
    elif settings.variant == "paper":
        replacement[:, is_image] = v[:, is_image].mean(axis=1, keepdims=True)
    else:
        replacement[:, is_image] = v[:, is_image].mean(axis=(1, 2), keepdims=True)
    kept = np.einsum("HTS,HSD->HTD", np.where(masked, 0, w), v)
    return kept + np.einsum("HTS,HSD->HTD", np.where(masked, w, 0), replacement), margin


class Edited:
    """The edits of one branch; `distorted` says whether IMD acts on it."""

    def __init__(self, config, settings, distorted, noise, places):
        self.config, self.settings, self.places = config["text_config"], settings, places
        self.distorted, self.noise = distorted, noise
        self.calls, self.margin = 0, np.inf

    def begin(self, call, hidden):
        self.calls, self.sums = self.calls + 1, []

    def attend(self, call, z):
        is_image = call.image_id > 0
        z, block = calibrated_scores(self.config, call.q, call.k, call.rows, is_image, self.settings, self.places)
        z, block = np.where(call.seen, z, -np.inf), block & call.seen
        self.sums.append(z[:, -1, is_image & call.seen[-1]].sum(axis=-1).mean())
        if not (is_image.any() and self.distorted and self.settings.imd):
            return np.einsum("HTS,HSD->HTD", llava.softmax(z), call.values)
        noise = None
        if self.settings.distort == "value_noise":
            noise = self.noise(self.calls - 1, call.layer, call.values[:, is_image])
        attended, margin = distorted_output(z, call.values, block, is_image, self.settings, noise)
        self.margin = min(self.margin, margin)
        return attended


def combine(main, contrast, alpha, beta):
    """(1 + alpha)·l − alpha·l̃ where l ≥ max(l) + ln(beta), −inf elsewhere; all [V]."""
    with np.errstate(divide="ignore"):
        keep = main >= main.max() + np.log(beta)
    return np.where(keep, (1 + alpha) * main - alpha * contrast, -np.inf)


def run(weights, config, input_ids, pixel_values, tokens, settings, noise=None, places=calibrated_positions, **model):
    """Prefill one unpadded sample and decode the forced `tokens`; returns a Result of 1 + len(tokens) rows.

    `noise(call, layer, values)` draws the replacement for `values` [H, image tokens, D] under
    distort="value_noise"; it is asked for by the contrast branch only. `places` (see `calibrated_scores`), `embed` and
    `image_ids` are those of the model.
    """
    edits = [Edited(config, settings, distorted, noise, places) for distorted in (False, True)]
    branches = [Branch(weights, config, edit, places=places, **model) for edit in edits]
    table, gate, alphas, gate_margin = [], [], [], np.inf
    for step in range(len(tokens) + 1):
        states = [one.token(tokens[step - 1]) if step else one.prompt(input_ids, pixel_values) for one in branches]
        main, contrast = (llava.head(weights, config, state[-1, -1]) for state in states)
        gate.append(float(np.mean(edits[0].sums)))
        mean = np.mean(gate[-GATE_WINDOW:] if settings.gate == "last" else gate[:GATE_WINDOW])
        alphas.append(0.0 if settings.gate is not None and gate[-1] < mean else settings.alpha)
        if step:
            gate_margin = min(gate_margin, abs(gate[-1] - mean))
        combined = combine(main, contrast, alphas[-1], settings.beta) if settings.imd else main
        table.append((main, contrast, combined))
    return Result(*map(np.stack, zip(*table, strict=True)), alphas, gate, edits[1].margin, gate_margin)
