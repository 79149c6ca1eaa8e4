"""Methods of one branch in plain NumPy float64.

Each is a method of `one_branch`; `margin` says how far a decision was from falling otherwise. A sample without an image
stays plain.
"""

import dataclasses

import numpy as np

from tests.reference import llava
from tests.reference.one_branch import cut, log_softmax, softmax_seen


@dataclasses.dataclass
class Field:
    """What they share: the layers in which they act, their margin, and the length of the prompt.

    `logits(call, z)` and `edit(call, w)` change logits [H, T, S] before the softmax and weights behind it, in place.
    """

    layers: tuple
    margin: float = np.inf
    prompt: int = 0

    def begin(self, call, hidden):
        self.prompt = len(call.image_id) if call.prefill else self.prompt

    def acts(self, call):
        return call.layer in self.layers and (call.image_id > 0).any()

    def logits(self, call, z):
        pass

    def edit(self, call, w):
        pass

    def weights(self, call, z):
        if not self.acts(call):
            return softmax_seen(call, z)
        z = z.copy()
        self.logits(call, z)
        w = softmax_seen(call, z)
        self.edit(call, w)
        return w

    def decided(self, *distances):
        self.margin = min([self.margin, *(abs(float(distance)) for distance in distances)])


@dataclasses.dataclass
class Vaf(Field):
    """ClearSight. System columns are the text before the first image."""

    enhance: float = 1.15
    suppress: float = 0.95

    def logits(self, call, z):
        images = np.flatnonzero(call.image_id > 0)
        for t, row in enumerate(call.rows):
            if row > images[-1]:
                z[:, t, images] *= self.enhance
                z[:, t, : images[0]] *= self.suppress


@dataclasses.dataclass
class MiddleLayers(Field):
    """arXiv 2411.16724."""

    alpha: float = 0.5

    def logits(self, call, z):
        for j in np.flatnonzero(call.image_id > 0):
            z[:, -1, j] += self.alpha * np.abs(z[:, -1, j]).mean()


@dataclasses.dataclass
class Spin(Field):
    rho: float = 0.95
    scale: float = 0.08
    variant: str = "paper"

    def logits(self, call, z):
        self.z = z

    def edit(self, call, w):
        image = np.flatnonzero((call.image_id > 0) & call.seen[-1])
        attention = (self.z if self.variant == "code" else w)[:, -1, image].sum(-1)
        count = self.rho * len(w)
        keep = int(np.floor(count)) if self.variant == "code" else int(np.ceil(count))
        order = sorted(range(len(w)), key=lambda h: -attention[h])
        if keep < len(w):
            self.decided(attention[order[keep - 1]] - attention[order[keep]])
        w[order[keep:], -1] *= self.scale


@dataclasses.dataclass
class Dab(Field):
    alpha: float = 0.5
    tau: float = 0.2
    decode: bool = False

    def edit(self, call, w):
        images = call.images()
        for h, (t, row) in ((h, one) for h in range(len(w)) for one in enumerate(call.rows)):
            if row <= images[-1][-1] or not (call.prefill or self.decode):
                continue
            r = [w[h, t, image].sum() for image in images]
            self.decided(sum(r) - self.tau)
            if sum(r) > self.tau:
                for image, mass in zip(images, r, strict=True):
                    w[h, t, image] -= self.alpha * (mass - np.mean(r)) / len(image)


@dataclasses.dataclass
class Iat(Field):
    alpha: float = 0.8

    def logits(self, call, z):
        if not call.prefill:
            z[:, -1, self.prompt :] += self.alpha * np.abs(z[:, -1, self.prompt :])


@dataclasses.dataclass
class FarSight(Field):
    sigma: float = 0.8

    def weights(self, call, z):
        if not (self.acts(call) and call.prefill):
            return softmax_seen(call, z)
        columns = np.arange(len(call.image_id))
        later = columns[None, :] > call.rows[:, None]
        registers = -self.sigma * (columns[None, :] - call.rows[:, None])
        w = llava.softmax(np.where(later, registers, np.where(call.seen, z, -np.inf)))
        return np.where(later, 0, w)


@dataclasses.dataclass
class Sparc(Field):
    alpha: float = 1.1
    beta: float = 0.1
    tau: float = 1.5
    selected: int = 20
    mean: np.ndarray | None = None
    jumps: np.ndarray | None = None

    def begin(self, call, hidden):
        if call.prefill:
            self.new = np.zeros((call.image_id > 0).sum())
        self.jumps = self.new  # of the steps before

    def edit(self, call, w):
        image = np.flatnonzero(call.image_id > 0)
        if call.layer == self.selected:
            attention = w[:, -1, image].mean(0)
            if call.prefill:
                self.mean = attention
            else:
                rise = (attention - self.mean) / np.where(self.mean > 0, self.mean, np.inf)
                self.decided(*((rise - self.tau) * self.mean))
                self.new = self.jumps + (rise >= self.tau)
                self.mean = (1 - self.beta) * attention + self.beta * self.mean
        if not call.prefill:
            w[:, -1, image] *= self.alpha**self.jumps


@dataclasses.dataclass
class Var(Field):
    """Sinks of text and image; a layer without a sink among its image tokens stays plain."""

    p: float = 0.6
    rho: float = 0.5
    tau: float = 20
    least: float = 0.2
    dims: tuple | None = None
    sinks: dict = dataclasses.field(default_factory=dict)

    def enter(self, call, hidden):
        if call.prefill:
            sizes = np.abs(hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + 1e-6))
            sizes = sizes[:, list(self.dims or np.argsort(-sizes[0])[:2])].max(-1)
            self.sinks[call.layer] = [j for j, size in enumerate(sizes) if size > self.tau]
            if call.layer in self.layers:
                self.decided(*(sizes - self.tau))

    def edit(self, call, w):
        image, sinks = np.flatnonzero(call.image_id > 0), self.sinks[call.layer]
        visual, rest = [j for j in sinks if j in image], [j for j in image if j not in sinks]
        for h, (t, row) in ((h, one) for h in range(len(w)) for one in enumerate(call.rows)):
            if row <= image[-1] or not visual:
                continue
            mass, on_sinks = w[h, t, image].sum(), w[h, t, visual].sum()
            self.decided(mass - self.least, on_sinks - self.rho * mass)
            if mass >= self.least and on_sinks / mass <= self.rho:
                budget = (1 - self.p) * w[h, t, sinks].sum()
                w[h, t, sinks] *= self.p
                w[h, t, rest] += budget * w[h, t, rest] / w[h, t, rest].sum()


@dataclasses.dataclass
class MemVR(Field):
    """`model` is (weights, config); `layers` are those whose output is judged."""

    model: tuple = ()
    rho: float = 0.12
    tau: float = 0.75
    visual: np.ndarray | None = None
    done: bool = False
    now: bool = False

    def begin(self, call, hidden):
        if call.prefill:
            self.visual = hidden[call.image_id > 0]
        self.done = len(self.visual) == 0

    def enter(self, call, hidden):
        self.now = False
        if call.layer - 1 in self.layers and not self.done:
            top = np.sort(llava.head(*self.model, hidden[-1:])[0])[-10:]
            p = llava.softmax(top)
            u = -(p * np.log(p)).sum() / np.log(10)
            self.decided(u - self.tau)
            self.now = self.done = u > self.tau

    def weights(self, call, z):
        return softmax_seen(call, z)

    def mlp(self, call, x, added):
        if not self.now:
            return added
        looked = (x @ self.visual.T) @ self.visual
        scale = np.abs(added).mean() / np.abs(looked).mean()
        return (1 - self.rho) * added + self.rho * scale * looked


@dataclasses.dataclass
class Only(Field):
    """`model` is (weights, config); `sides` collects the side path's logits, one row a step."""

    model: tuple = ()
    sides: list = dataclasses.field(default_factory=list)

    def edit(self, call, w):
        """Changes nothing; a copy of the first layer's last row becomes the side path."""
        if call.layer:
            return
        image, row, ratio = np.flatnonzero(call.image_id > 0), w[:, -1].copy(), []
        text = np.setdiff1d(np.arange(1, len(call.image_id)), image)
        for h in range(len(row)):
            entropy = []
            for group in (text, image):
                part = row[h, group]
                high = part.mean() + part.std(ddof=1)
                self.decided(*(part - high))
                row[h, group] = part = np.where(part > high, 0, part)
                share = part / part.sum()
                entropy.append(-(share * np.log(share + 1e-6)).sum())
            ratio.append(entropy[0] / entropy[1])
        self.decided(*(np.array(ratio) - np.mean(ratio)))
        row[np.array(ratio) < np.mean(ratio)] = 0
        mixed = np.einsum("HS,HSD->HD", row, call.values).reshape(1, -1)
        self.output = llava.linear(self.model[0], f"{llava.LANGUAGE}.layers.0.self_attn.o_proj", mixed)

    def enter(self, call, hidden):
        if call.layer == call.depth - 1 and (call.image_id > 0).any():
            weights, config = self.model
            name, epsilon = f"{llava.LANGUAGE}.layers.{call.layer}", config["text_config"]["rms_norm_eps"]
            g = 0.2 * hidden[-1:] + llava.rms_norm(weights, f"{name}.input_layernorm", self.output, epsilon)
            read = llava.rms_norm(weights, f"{name}.post_attention_layernorm", g, epsilon)
            g = g + llava.feed_forward(weights, config, call.layer, read)
            self.sides.append(llava.head(weights, config, g)[0])


def only_combined(main, sides, tau=0.2, beta=0.1):
    """Combined logits of ONLY [T, V], how far each is from the cut, and how far the steps are from τ."""
    side = np.stack(sides) + 0.5 * main
    apart = np.abs(np.exp(log_softmax(main)) - np.exp(log_softmax(side))).sum(-1, keepdims=True)
    return *cut(main, np.where(apart < tau, main + 3 * side, 2 * main - side), beta), np.abs(apart - tau).min()


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass
class Vti(Field):
    """`vision` and `strength_image` are those of the tower."""

    directions: np.ndarray | None = None
    strength: float = 0.9
    vision: np.ndarray | None = None
    strength_image: float = 0.9

    def embed(self, weights, config, ids, pixels):
        def fed(layer, added):
            return steered(added, self.strength_image, self.vision[layer])

        return llava.embed(weights, config, ids, pixels, lambda layer, w: w, fed)

    def mlp(self, call, x, added):
        if not (call.image_id > 0).any():
            return added
        return steered(added, self.strength, self.directions[call.layer])


def steered(x, strength, v):
    return np.linalg.norm(x, axis=-1, keepdims=True) * unit(unit(x) + 0.1 * strength * unit(v))


def masked_minus_original(weights, config, pixels, masks):
    """[L, W]: the tower's states on masked copies of pixels [3, height, width] minus those on these, mean over patches.

    `masks` [copies, patches].
    """
    patch = config["vision_config"]["patch_size"]

    def states(picture):
        return np.stack(llava.tower_hidden_states(weights, config, picture)[1:]).mean(axis=1)

    return np.mean([states(masked(pixels, mask, patch)) for mask in masks], axis=0) - states(pixels)


def masked(pixels, mask, patch, seen=None):
    """Pixels [3, height, width] whose masked patches have the mean of each channel over all patches that are seen."""
    across, copy = pixels.shape[2] // patch, pixels.copy()
    squares = [(slice(None), slice(i * patch, (i + 1) * patch), slice(j * patch, (j + 1) * patch))
               for i in range(len(mask) // across) for j in range(across)]  # fmt: skip
    counts = np.ones(pixels.shape[1:], bool)
    for place in () if seen is None else np.flatnonzero(~np.asarray(seen)):
        counts[squares[place][1:]] = False
    mean = pixels[:, counts].mean(axis=1)
    for place in np.flatnonzero(mask):
        copy[squares[place]] = mean[:, None, None]
    return copy


@dataclasses.dataclass
class Nullu(Field):
    directions: np.ndarray | None = None

    def mlp(self, call, x, added):
        for v in self.directions[call.layer] if call.layer in self.layers else ():
            added = added - (added @ v)[:, None] * v
        return added


@dataclasses.dataclass
class Adhh(Field):
    heads: tuple = ()
    tau: float = 0.4

    def edit(self, call, w):
        text = w[:, -1, np.flatnonzero(call.image_id > 0)[-1] + 1 :]
        for head in [head for layer, head in self.heads if layer == call.layer]:
            self.decided(text[head].sum() - self.tau)
            if text[head].sum() >= self.tau:
                text[head] = 0


@dataclasses.dataclass
class Adaiat(Field):
    ratios: np.ndarray | None = None
    thresholds: np.ndarray | None = None
    alpha: float = 6.0

    def edit(self, call, w):
        if call.prefill:
            return
        written = w[:, -1, self.prompt :]
        distance = written.mean(-1).sum() - self.thresholds[call.layer]
        self.decided(distance)
        if distance < 0:
            written *= np.maximum(1 + self.alpha * (self.ratios[call.layer] - 1), 0)[:, None]
            w[:, -1] /= w[:, -1].sum(-1, keepdims=True)
