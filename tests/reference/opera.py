"""OPERA in plain NumPy float64: every beam is a list of tokens, and every score comes from a run of the whole prompt.

Nothing is carried from step to step but the tokens of the beams and what was noted: attention among answer tokens,
column products and the columns of every prefix are computed anew from the last layer's attention.

The variants find the place to go back to in different ways. The paper's looks at the columns of a beam's own tokens.
The authors' code notes one column per beam and step, the mode of the newest columns of all its candidates; notes stay
in the beams' places when beams move to others, and the place is the mode of the newest notes over beams.
"""

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import Branch, image_ids, log_softmax

DEAD = -1e9


def mode(values):
    """The most frequent value; the smallest one of several."""
    return int(np.bincount(values).argmax())


def place_of_notes(notes, threshold):
    """s of the authors' code, or None: `notes` [steps][beams], the newest last."""
    place = mode(notes[-1])
    often = all(sum(note == place for note in beam) >= threshold for beam in zip(*notes, strict=True))
    return place if often and place >= 10 else None


class Beam:
    """Tokens of an answer, its score, the log-probabilities of its tokens, and the column of each token."""

    def __init__(self, tokens=(), score=0.0, logprobs=(), columns=()):
        self.tokens, self.score, self.logprobs, self.columns = tokens, score, logprobs, columns


class Opera:
    """One sample. `ways_back` lists rollbacks (length before, length after); `margin` is that of the closest choice."""

    def __init__(self, weights, config, ids, pixels, settings, stop=()):
        self.weights, self.config, self.ids, self.stop = weights, config, list(ids), stop
        self.__dict__.update(
            {"alpha": 1.0, "sigma": 50.0, "beams": 5, "candidates": 5, "threshold": 15, "max_rollbacks": 5,
             "window": 512, "variant": "code"} | settings
        )  # fmt: skip
        self.ways_back, self.margin, self.memo = [], np.inf, {}
        self.prompt = llava.embed(weights, config, ids, pixels)

    def run(self, tokens):
        """Next-token logits [V], and rows [t, S] of the last layer's attention, largest over heads."""
        if tokens not in self.memo:
            model, embeddings = Branch(self.weights, self.config), self.prompt
            if tokens:
                more = self.weights[f"{llava.LANGUAGE}.embed_tokens.weight"][list(tokens)]
                embeddings = np.concatenate([embeddings, more])
            image_id = np.append(image_ids(self.config, self.ids), np.zeros(len(tokens), int))
            hidden = model.call(embeddings, image_id)[-1, -1]
            attention = model.attention[-1].max(axis=0)
            if self.variant == "code":
                attention = attention / attention.sum(axis=1, keepdims=True)
            rows = attention[len(self.ids) :]
            self.memo[tokens] = llava.head(self.weights, self.config, hidden), rows, image_id > 0
        return self.memo[tokens]

    def over_trust(self, tokens):
        """φ and c of the newest token."""
        _, rows, is_image = self.run(tokens)
        square = self.sigma * rows[:, len(self.ids) :]
        newest = len(tokens) - 1
        first = max(0, newest + 1 - self.window)
        products = np.array([square[j:, j].prod() for j in range(first, newest + 1)])
        if self.variant == "paper":
            self.note(products)
            return products.max(), first + int(products.argmax())
        with np.errstate(over="ignore", under="ignore"):
            halves, below, above = (np.float16(1e-7 * products * (1 + e)) for e in (0, -1e-5, 1e-5))
        best = int(halves.argmax())
        others = np.delete(above, best)
        # Small products are all the same 0, of which the first counts.
        tied = (halves == halves[best]).sum() > 1 and (below == above).all()
        if not tied and len(others) and others.max() >= below[best]:
            self.margin = 0.0
        return (float(halves[best]) if len(tokens) > 10 else -rows[-1, is_image].sum()), first + best

    def note(self, values, scale=True):
        """Remembers the relative distance between the best of some values and the next."""
        ordered = np.sort(values)[::-1]
        if len(ordered) > 1 and ordered[1] > DEAD / 2:
            size = abs(ordered[0]) if scale else 1.0
            self.margin = min(self.margin, (ordered[0] - ordered[1]) / max(size, 1e-300))

    def candidates_of(self, beam):
        """(token, gain, log-probability, column) of the tokens that may follow, most likely first."""
        logits = self.run(beam.tokens)[0]
        order = np.argsort(-logits, kind="stable")[: self.candidates]
        logprobs = log_softmax(logits)
        found = [self.over_trust((*beam.tokens, int(token))) for token in order]
        phi = np.array([one for one, _ in found])
        if self.variant == "code":
            gains = log_softmax(logits[order] - self.alpha * phi)
        else:
            gains = logprobs[order] - self.alpha * phi
        return [
            (int(token), gain, logprobs[token], column)
            for token, gain, (_, column) in zip(order, gains, found, strict=True)
        ]

    def extend(self, beams, kept, banned, limit):
        """One token more: (beams, kept, pairs that were chosen, whether the search goes on, notes of this step)."""
        options, notes = [], []
        for place, beam in enumerate(beams):
            found = self.candidates_of(beam)
            notes.append(mode([column for *_, column in found]))
            for token, gain, logprob, column in found:
                if (place, token) in banned:
                    gain = DEAD
                new = Beam((*beam.tokens, token), beam.score + gain, (*beam.logprobs, logprob),
                           (*beam.columns, column))  # fmt: skip
                options.append((place, token, new))
        options.sort(key=lambda option: -option[2].score)
        spare = max(2, 1 + len(self.stop)) * self.beams
        for first, second in zip(options[:spare], options[1 : spare + 1], strict=False):
            if second[2].score > DEAD / 2:
                self.margin = min(self.margin, first[2].score - second[2].score)
        options = options[:spare]
        length = len(beams[0].tokens) + 1
        ends = [token in self.stop or length >= limit for _, token, _ in options]
        finished = [option[2] for option, end in zip(options[: self.beams], ends, strict=False) if end]
        running = [option for option, end in zip(options, ends, strict=True) if not end][: self.beams]
        kept = sorted([*kept, *finished], key=lambda beam: -beam.score / len(beam.tokens))[: self.beams]
        goes_on = bool(running)
        if running and len(kept) == self.beams:
            worst = kept[-1]
            goes_on = running[0][2].score / length > worst.score / len(worst.tokens)
        return [one for _, _, one in running], kept, {(p, t) for p, t, _ in running}, goes_on, notes

    def place_to_go(self, beams, notes):
        """s, if all living beams came back to it often enough; `notes` has one note per beam for each step."""
        if self.variant == "code":
            return place_of_notes(notes, self.threshold)
        columns = np.array([beam.columns for beam in beams if beam.score > DEAD / 2])
        columns = columns[:, -self.window :]
        place = mode([mode(row) for row in columns])
        return place if ((columns == place).sum(axis=1) > self.threshold).all() else None

    def answer(self, limit):
        """The best answer as a Beam."""
        # The beams start alike, and only one of them counts.
        history = [([Beam(), *(Beam(score=DEAD) for _ in range(self.beams - 1))], [], [])]
        chosen, banned, taken, latest = [], {}, {}, 0
        while True:
            count = len(history) - 1
            before = history[-1]
            beams, kept, pairs, goes_on, new = self.extend(*before[:2], banned.get(count - 1, set()), limit)
            if not goes_on:
                return kept[0]
            notes = [*before[2], new]
            history.append((beams, kept, notes))
            chosen.append(pairs)
            place = self.place_to_go(beams, notes)
            if place is None or place >= count or (self.variant == "paper" and place < latest):
                continue
            for target in (place, place - 1):
                alive = [beam.score > DEAD / 2 for beam in history[max(target, 0) + 1][0]]
                used = sum(alive[beam] for beam, _ in banned.get(target, ()))
                left = sum(alive) * self.candidates - used - self.beams
                if target >= 0 and taken.get(target, 0) < self.max_rollbacks and left > 0:
                    break
            else:
                continue
            latest = place
            taken[target] = taken.get(target, 0) + 1
            banned = {old: pairs for old, pairs in banned.items() if old <= target}
            banned[target] = banned.get(target, set()) | chosen[target + 1]
            self.ways_back.append((count + 1, target + 1))
            history, chosen = history[: target + 2], chosen[: target + 1]
