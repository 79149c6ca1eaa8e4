"""Flow-alignment training in plain NumPy float64: one unpadded conversation at a time, one pass over all its tokens.

z are the attention logits of a row over the columns that it sees, ẑ their edit by SEVI. The first term sums, over rows
that predict an answer token, layers from `start_layer` on and heads that a stage moves, KL(softmax(ẑ) ‖ softmax(z));
the second, over the same rows, KL of the next-token distributions of the edited base and of the student.
"""

import dataclasses

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import Branch, log_softmax


@dataclasses.dataclass
class Settings:
    omega: float
    kappa: float
    start_layer: int


def edit(z, after, settings):
    """SEVI in one row: (edited [H, S], which stage moves each head or 0 [H]) of logits [H, S] of the seen columns.

    `after` [S] are those that are text after the last image.
    """
    w = llava.softmax(z)
    semantic = [h for h in range(len(z)) if w[h, after].sum() >= w[h, ~after].sum()]
    core = [h for h in semantic if w[h, after].max() > settings.kappa * w[h, after].sum()]
    spread = [h for h in semantic if h not in core]
    new, stage = z.copy(), np.zeros(len(z), int)
    for h in range(len(z)):
        if h not in semantic and spread:
            stage[h], toward = 1, z[spread].mean(0)
        elif h in spread and core:
            stage[h], toward = 2, z[core].max(0)
        else:
            continue
        new[h] = (z[h] + settings.omega * toward) / (1 + settings.omega)
    return new, stage


@dataclasses.dataclass
class Pass:
    """One pass: logits [A, V] of the answer rows; per edited layer and row z [H, S] of seen columns, ẑ and stages."""

    answer_rows: list
    settings: Settings
    edited: bool
    rows: dict = dataclasses.field(default_factory=dict)
    logits: np.ndarray | None = None

    def weights(self, call, z):
        images = np.flatnonzero(call.image_id > 0)
        after = call.rows > images[-1] if len(images) else np.zeros(len(call.rows), bool)
        z = np.where(call.seen, z, -np.inf)
        for row in self.answer_rows if call.layer >= self.settings.start_layer else ():
            own, seen = z[:, row, call.seen[row]], call.seen[row]
            new, stage = edit(own, after[seen], self.settings)
            self.rows[call.layer, row] = own, new, stage
            if self.edited:
                z[:, row, seen] = new
        return llava.softmax(z)


def forward(weights, config, tokens, pixels, answer_rows, settings, edited=False):
    """A `Pass` over `tokens`; `edited` puts ẑ in the place of z in the answer rows."""
    found = Pass(answer_rows, settings, edited)
    hidden = Branch(weights, config, found).prompt(tokens, pixels)[-1]
    found.logits = llava.head(weights, config, hidden[answer_rows])
    return found


def kl(target, logits):
    """KL(softmax(target) ‖ softmax(logits)) over the last axis."""
    p, q = log_softmax(target), log_softmax(logits)
    return (np.exp(p) * (p - q)).sum(-1)


def attention_term(student, fixed, stage):
    """The first term; edited logits and stages are those of the pass `fixed`, which has no gradient."""
    total = 0.0
    for place, (own, _, _) in student.rows.items():
        _, new, stages = fixed.rows[place]
        total += kl(new, own)[stages == stage].sum()
    return total


def moved(student, stage):
    """How many heads a stage moves, over all edited layers and answer rows."""
    return sum((stages == stage).sum() for _, _, stages in student.rows.values())


def answer_term(student, teacher):
    """The second term."""
    return kl(teacher.logits, student.logits).sum()
