"""Two or three numbers of every method, worked out by hand on examples of 2 heads and 4 columns, or of 3 tokens.

Stages are called directly, on one layer of one sample, or on one step's logits. Columns are system text, two image
tokens and text unless an example says otherwise.
"""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods.base import WarmUp
from lvlm_jax.methods.fitted import Fitted, Source
from lvlm_jax.methods.memvr import Retrace
from lvlm_jax.methods.only import drop_high_weights
from lvlm_jax.methods.sparc import Jumps
from tests.methods.compare import COLUMNS, context, row, site, stream

INF = np.inf


def close(got, want):
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=0, atol=2e-5)


def log(*probabilities):
    return np.log(np.array(probabilities)).tolist()


COMBINED = {
    # α 3, cut at 2 - 1.5 = 0.5:  4 * 2 - 3 * 1 = 5   4 * 1 - 3 * 2 = -2   -1 < 0.5
    "cmac": (methods.CMAC(alpha=3, beta=np.exp(-1.5)), [2, 1, -1], [1, 2, 0], None, (), [5, -2, -INF]),
    # α 1, cut at 3 + ln 0.1 = 0.697:  2 * 3 - 1 = 5   2 * 2 - 2 = 2   0 < 0.697
    "vcd": (methods.VCD(), [3, 2, 0], [1, 2, 1], None, (), [5, 2, -INF]),
    "icd": (methods.ICD(), [3, 2, 0], [1, 2, 1], None, (), [5, 2, -INF]),
    # α 0.5:  1.5 * 3 - 0.5 * 1 = 4   1.5 * 2 - 0.5 * 2 = 2
    "sid": (methods.SID(), [3, 2, 0], [1, 2, 1], None, (), [4, 2, -INF]),
    # γ 1.1:  1.1 ln 0.8 - 0.1 ln 0.5 = -0.24546 + 0.06931   1.1 ln 0.15 - 0.1 ln 0.25 = -2.08683 + 0.13863
    # cut at 0.1 * 0.8 = 0.08 > 0.05
    "pai": (methods.PAI(), log(0.8, 0.15, 0.05), log(0.5, 0.25, 0.25), None, (), [-0.17615, -1.94820, -INF]),
    # t 50:  g = e^-1, (1 - g) / g = e - 1 = 1.71828; max p = 0.5 < 0.9
    # ln 0.5 + 1.71828 ln 2 = -0.69315 + 1.19102   ln 0.3 + 1.71828 ln 1.2 = -1.20397 + 0.31328
    # ln 0.2 + 1.71828 ln 0.4 = -1.60944 - 1.57444
    "m3id": (methods.M3ID(), log(0.5, 0.3, 0.2), log(0.25, 0.25, 0.5), None, [50.0], [0.49787, -0.89069, -3.18388]),
    # 0.5 is no less than a gate of 0.4: nothing is added
    "m3id sure": (methods.M3ID(alpha_gate=0.4), log(0.5, 0.3, 0.2), log(0.25, 0.25, 0.5), None, [50.0],
                  log(0.5, 0.3, 0.2)),
    # no gate, and cut at 0.5 * 0.5 = 0.25 > 0.2
    "m3id port": (methods.M3ID(variant="port", beta=0.5), log(0.5, 0.3, 0.2), log(0.25, 0.25, 0.5), None, [50.0],
                  [0.49787, -0.89069, -INF]),
    # p = (1/2, 1/2), p~ = (3/4, 1/4), m = (5/8, 3/8):
    # KL(p|m) = (ln 0.8 + ln 1.33333) / 2 = 0.03227   KL(p~|m) = 0.75 ln 1.2 + 0.25 ln 0.66667 = 0.03537
    # J = 0.03382   α = 1 - log10 J = 2.47083
    # ln 0.5 + α ln (0.5 / 0.75) = -0.69315 - 1.00184   ln 0.5 + α ln (0.5 / 0.25) = -0.69315 + 1.71264
    "sevi + cicd": (methods.SEVI(cicd=True), log(0.5, 0.5), log(0.75, 0.25), None, (), [-1.69499, 1.01949]),
    # 0.034 is below the 0.1 of the authors' Qwen2-VL files
    "sevi + cicd, code-qwen": (methods.SEVI(cicd=True, variant="code-qwen"), log(0.5, 0.5), log(0.75, 0.25), None, (),
                               log(0.5, 0.5)),
    # The second exit is the further one:  ln (0.7 / 0.1)   ln (0.2 / 0.2)   0.1 < 0.2 * 0.7
    "dola": (methods.DoLa(beta=0.2), log(0.7, 0.2, 0.1), None, [log(0.6, 0.3, 0.1), log(0.1, 0.2, 0.7)], (),
             [1.94591, 0, -INF]),
    # Candidates up to 0.8: the first two. The first exit is sure of them by 0.2, the second by 0.5 = p*:
    # ln 0.6 + 0.6 * 0.5 ln 0.1 = -0.51083 - 0.69078   ln 0.3 + 0.6 * 0.5 ln 0.5 = -1.20397 - 0.20794
    "deco": (methods.DeCo(top_p=0.8), log(0.6, 0.3, 0.1), None, [log(0.2, 0.1, 0.7), log(0.1, 0.5, 0.4)], (),
             [-1.20161, -1.41191, -INF]),
    # p = (1/2, 1/2), u = (3/4, 1/4):  g = -0.25 ln (2/3) + 0.25 ln 2 = 0.27465, tanh (1 / g) = 0.99862, a = 1.59890
    # 2.59890 ln 0.5 - a ln 0.75 = -1.80142 + 0.45997   -1.80142 - a ln 0.25 = -1.80142 + 2.21654
    "nolan": (methods.NoLan(), log(0.5, 0.5), log(0.75, 0.25), None, (), [-1.34145, 0.41512]),
    "avisc": (methods.AvisC(), [3, 2, 0], [1, 2, 1], None, (), [5, 2, -INF]),
    # 3 * 3 - 2 * 1 = 7   3 * 2 - 2 * 2 = 2
    "damro": (methods.DAMRO(), [3, 2, 0], [1, 2, 1], None, (), [7, 2, -INF]),
    # 3 + 3 * 1   2 + 3 * 2   0 < 3 + ln 0.1
    "ritual": (methods.RITUAL(), [3, 2, 0], [1, 2, 1], None, (), [6, 8, -INF]),
    # Exits (1, 3) and (3, 5), mean (2, 4):  0.7 * 2 + 0.3 * 2 = 2   0.7 * 1 + 0.3 * 4 = 1.9
    "vista": (methods.VISTA(), [2, 1], None, [[1, 3], [3, 5]], (), [2, 1.9]),
}  # fmt: skip


@pytest.mark.parametrize(("method", "main", "contrast", "exits", "memory", "want"), COMBINED.values(), ids=COMBINED)
def test_next_token_logits(method, main, contrast, exits, memory, want):
    def given(logits):
        return None if logits is None else jnp.asarray(logits, jnp.float32)

    readout = methods.Readout(
        given([main]),
        None if contrast is None else given([contrast]),
        None if exits is None else given(exits)[:, None],
        jnp.ones(1, bool),
    )
    combined, _ = method.combine(readout, given(memory) if memory else memory)
    close(combined[0], want)


def test_causalmm():
    """2 * 3 - 0.5 (1 + 2) = 4.5   2 * 2 - 0.5 (2 + 1) = 2.5   0 < 3 + ln 0.1."""
    main, tower, decoder = jnp.asarray([[[3.0, 2, 0]], [[1, 2, 1]], [[2, 1, 1]]])
    readout = methods.Readout(main, tower, None, jnp.ones(1, bool), decoder[None])
    close(methods.CausalMM().combine(readout, ())[0], [[4.5, 2.5, -INF]])


def test_cmac_gate():
    """s = 2, 1, 3; means of the steps so far 2, 1.5, 2: α is 0 at the second step alone. 2 * 1 - 0 = 2, 2 * 0 - 0.5."""
    method = methods.CMAC(alpha=1, beta=0.1, gate="first")
    memory, combined = method.start(1), []
    for s in (2.0, 1.0, 3.0):
        readout = methods.Readout(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 0.5]]), None, jnp.asarray([s]))
        logits, memory = method.combine(readout, memory)
        combined.append(logits[0])
    close(combined, [[2, -0.5], [1, 0], [2, -0.5]])


def test_cmac_positions():
    """P^c = 0, 1, 1.5, 2 for γ = 2: the last row is 1 and 0.5 away from the image tokens, whatever number it has."""
    turned = methods.CMAC(gamma=2).positions(jnp.asarray([1.0, 2.0]), jnp.asarray([0, 1]), 2)
    close(3 - turned, [1, 0.5])


Z = row([0, 1, 3, 0], [0, 2, 0, 0])  # θ = (1 + 3 + 2 + 0) / 4 = 1.5: masked are column 2 of head 0, column 1 of head 1
W = row([0.1, 0.2, 0.4, 0.3], [0.2, 0.4, 0.2, 0.2])
# Per head: nothing of text, (1, 3) and (5, 7) of the image: mean (3, 5), over channels too 4.
VALUES = np.array([[[0, 0], [1, 3], [5, 7], [0, 0]]] * 2, np.float32)


def test_cmac_values():
    """A masked weight of 0.4 in each head: spread over two columns (paper), or times one number (code)."""
    spread = methods.CMAC().branches()[1].weights(site(Z), jnp.asarray(W)[None])
    close(spread[0, :, 0], [[0.1, 0.4, 0.2, 0.3], [0.2, 0.2, 0.4, 0.2]])
    coded = methods.CMAC(variant="code").branches()[1].values(
        site(Z), jnp.asarray(W)[None], lambda w: jnp.einsum("BHRS,HSD->BHRD", w, jnp.asarray(VALUES))
    )  # fmt: skip
    # head 0: 0.2 (1, 3) + 0.4 * 4   head 1: 0.2 (5, 7) + 0.4 * 4
    close(coded[0, :, 0], [[1.8, 2.2], [2.6, 3.0]])


# Three image tokens and a text row; softmax weights of two heads.
MAPS = np.array(
    [
        [[1, 0, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.2, 0.7, 0], [0.25, 0.25, 0.25, 0.25]],
        [[1, 0, 0, 0], [0.4, 0.6, 0, 0], [0.4, 0.5, 0.1, 0], [0.1, 0.1, 0.1, 0.7]],
    ]
)
EAH = {
    # Means of later image rows: head 0 (0.6 + 0.1) / 2 = 0.35, 0.2; head 1 (0.4 + 0.4) / 2 = 0.4, 0.5: 1 and 2 sinks.
    "eah": (methods.EAH(beta=0.3), 1),
    # 0.35, 0.2 and 0.4, 0.5 again, of which 0.45 leaves head 1 one sink, and head 0 none.
    "eah, one sink": (methods.EAH(beta=0.45), 1),
    "eah, no sink": (methods.EAH(beta=0.55), None),
    # All later rows, over S0 + E - j = 3, 2, 1:  head 0 (0.6 + 0.1 + 0.25) / 3 = 0.317, (0.2 + 0.25) / 2 = 0.225, 0.25
    # head 1 (0.4 + 0.4 + 0.1) / 3 = 0.3, (0.5 + 0.1) / 2 = 0.3, 0.1.  Two sinks of head 1; of head 0 alone, no change.
    "eah code": (methods.EAH(variant="code", beta=0.28), 1),
    "eah code, head 0": (methods.EAH(variant="code", beta=0.31), None),
}
ONE, LAST = (0, 1, 0, 0), jnp.asarray([[False, False, False, True]])
SECOND = jnp.asarray([[False, True, False, False]])
GLOBAL = [0, 0, 1, 1]  # text 2e = 5.44 of 7.44; the largest share of it, 0.5, is below κ = 0.6
SEVI = methods.SEVI(omega=4, kappa=0.6)
Z24, TWO = row([1, 2, -4, 1], [0, 4, 2, 0]), row([0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.2, 0.5])
EVEN = np.tril(np.ones((1, 4, 4))) / np.arange(1, 5)[:, None]


def fitted(word, **arrays):
    return Fitted({name: jnp.asarray(array) for name, array in arrays.items()}, Source(word, "", "", ""))


# Method, what it edits (logits that are not given are 0, weights of softmax), the site, and the rows that come out.
STAGES = {
    **{name: (method, MAPS, {"image_id": (1, 1, 1, 0)}, MAPS if winner is None else MAPS[[winner, winner]])
       for name, (method, winner) in EAH.items()},
    # SEVI: system text, one image token, two text tokens.
    # e² + e = 10.1 outside against 2: head 0 is drawn to head 1:  (2 + 0, 1 + 0, 0 + 4, 0 + 4) / 5
    "sevi, stage 1": (SEVI, row([2, 1, 0, 0], GLOBAL), {"image_id": ONE}, [[0.4, 0.2, 0.8, 0.8], GLOBAL]),
    # 20.1 / 21.1 of the text on one token: head 0 is core, head 1 drawn to it:  (0, 0, 1 + 12, 1 + 0) / 5
    "sevi, stage 2": (SEVI, row([0, 0, 3, 0], GLOBAL), {"image_id": ONE}, [[0, 0, 3, 0], [0, 0, 2.6, 0.2]]),
    # e² + 1 = 8.4 on system text and image against e + 1 = 3.7
    "sevi, system text": (SEVI, row([2, 0, 1, 0], GLOBAL), {"image_id": ONE}, [[0.4, 0, 1, 0.8], GLOBAL]),
    # 1 on the image against 3.7, of which 0.73 on one token: core:  (0 + 8, 0, 1 + 4, 1 + 0) / 5
    "sevi, code-qwen": (dataclasses.replace(SEVI, variant="code-qwen"), row([2, 0, 1, 0], GLOBAL), {"image_id": ONE},
                        [[2, 0, 1, 0], [1.6, 0, 1, 0.2]]),
    # |z| 2 and 4:  2 + 0.2 * 2   -4 + 0.2 * 4
    "pai": (methods.PAI(), Z24, {}, [[1, 2.4, -3.2, 1], [0, 4.8, 2.4, 0]]),
    # system 0.95, image 1.15:  0.95   2.3   -4.6
    "vaf": (methods.VAF(), Z24, {}, [[0.95, 2.3, -4.6, 1], [0, 4.6, 2.3, 0]]),
    # mean |z| over heads (2 + 4) / 2 = 3 and (4 + 2) / 2 = 3, half of it is 1.5
    "middle_layers": (methods.MiddleLayers(), Z24, {}, [[1, 3.5, -2.5, 1], [0, 5.5, 3.5, 0]]),
    # Generated is the last column alone: |z| 1 and 0.
    "iat": (methods.IAT(), Z24, {"generated": LAST, "phase": "decode"}, [[1, 2, -4, 1.8], [0, 4, 2, 0]]),
    # ⌈0.5 * 2⌉ = 1 of two heads stays; masses on the image 0.4 and 0.4: the earlier. Head 1 times 0.1.
    "spin": (methods.SPIN(rho=0.5, scale=0.1), TWO, {}, [TWO[0, 0], 0.1 * TWO[1, 0]]),
    # Images of one token each: r = 0.1, 0.3 and 0.2, 0.2; means 0.2:  - 0.5 * (-0.1), - 0.5 * 0.1
    "dab": (methods.DAB(), TWO, {"image_id": (0, 1, 2, 0)}, [[0.4, 0.15, 0.25, 0.2], TWO[1, 0]]),
    # Column 1 is a sink: shares 0.1 of 0.4 and 0.2 of 0.4, both centric. 0.4 * 0.1 = 0.04 and 0.08 go to column 2.
    "var": (methods.VAR(), TWO, {"carry": (SECOND,)}, [[0.4, 0.06, 0.34, 0.2], [0.1, 0.12, 0.28, 0.5]]),
    # A mass of 0.4 is less than 0.5: no head is centric.
    "var, mass": (methods.VAR(least=0.5), TWO, {"carry": (SECOND,)}, TWO[:, 0]),
    # Text behind the image has 0.2 and 0.5: of the listed heads 0 and 1 of layer 2 only head 1 reaches 0.4.
    "adhh": (methods.ADHH(heads=(2, 0, 2, 1)), TWO, {"layer": 2}, [TWO[0, 0], [0.1, 0.2, 0.2, 0]]),
    # One generated column: 0.2 + 0.5 < 1. Factors 1 + 6 (1.5 - 1) = 4 and 1: (0.4, 0.1, 0.3, 0.8) / 1.6.
    "adaiat": (methods.AdaIAT(fitted=fitted("adaiat", ratios=[[1.5, 1.0]], thresholds=[1.0])), TWO,
               {"generated": LAST, "phase": "decode"}, [[0.25, 0.0625, 0.1875, 0.5], TWO[1, 0]]),
    # σ = ln 2, all logits 0: registers are 1/2, 1/4, 1/8. The third of four rows has 1/2 beside 3: (1/3) 3 / 3.5. The
    # first has 0.875 beside 1, the second 0.75 beside 2.
    "farsight": (methods.FarSight(sigma=np.log(2)), EVEN, {},
                 [[0.53333, 0, 0, 0], [0.36364, 0.36364, 0, 0], [0.28571, 0.28571, 0.28571, 0], [0.25] * 4]),
}  # fmt: skip
ON_LOGITS = ("sevi", "pai", "vaf", "middle_layers", "iat")


@pytest.mark.parametrize("name", STAGES)
def test_stage(name):
    """One layer's logits or weights."""
    method, given, where, want = STAGES[name]
    stage = "logits" if name.startswith(ON_LOGITS) else "weights"
    logits = given if stage == "logits" else np.log(given) if np.min(given) > 0 else np.zeros_like(given)
    got = getattr(method, stage)(site(logits, **where), jnp.asarray(given, jnp.float32)[None])[0]
    close(got, np.reshape(np.asarray(want, np.float32), got.shape))


def test_sid_keeps_the_least_attended():
    """Means over heads (0.3 + 0.1) / 2 = 0.2 and (0.1 + 0.2) / 2 = 0.15: with one to keep, column 1 is hidden."""
    branch = methods.SID(keep=1).branches()[1]
    w = row([0.3, 0.3, 0.1, 0.3], [0.3, 0.1, 0.2, 0.4])
    carry = branch.begin(context(COLUMNS, 1), jnp.zeros((1, 1, 1)))
    carry = branch.observe(site(np.log(w), layer=1, carry=carry), jnp.asarray(w)[None])
    after = site(np.log(w), layer=2, carry=carry)
    np.testing.assert_array_equal(
        np.asarray(branch.mask(after, after.mask[:, None]))[0, 0, 0], [True, False, True, True]
    )


def test_capl():
    """Two images of two tokens; of lengths 1, 3 and 2, 1 the longer ones are selected: row 1 sees column 2 besides.

    Its weights are (1/2, 1/2, 0, 0) and (1/3, 1/3, 1/3, 0), half of each: 5/12, 5/12, 1/6.
    """
    method, images = methods.CAPL(rho=0.5, sigma=0.5), (1, 1, 2, 2)
    carry = method.begin(context(images, 4), jnp.asarray([[[1.0], [3.0], [-2.0], [1.0]]]))
    here = site(np.zeros((2, 4, 4)), images, carry=carry)
    causal = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    got = method.weights(here, jnp.asarray([[causal, causal]], jnp.float32))
    want = causal.copy()
    want[1] = [5 / 12, 5 / 12, 1 / 6, 0]
    close(got[0], [want, want])


@pytest.mark.parametrize(
    ("variant", "last"), [("paper", [False, False, True, True]), ("code-qwen", [False, False, False, True])]
)
def test_capl_truncated(variant, last):
    """The second image does not see the first; in the Qwen file its second token does not see its first either."""
    here = site(np.zeros((2, 4, 4)), (1, 1, 2, 2))
    mask = methods.CAPL(mode="truncated", variant=variant).mask(here, here.mask[:, None])
    np.testing.assert_array_equal(np.asarray(mask)[0, 0, 2:], [[False, False, True, False], last])


def test_clva():
    """Three layers: 0 is noise, 1 has the anchors, 2 is edited.

    Layer 0: maxima 0.3, 0.3, so n = (1/2, 1/2). Layer 1: 0.6, 0.2, so p = (3/4, 1/4); A = p - n = (1, 0), R = (0, 1).
    Layer 2: p = (1/2, 1/2); g = 1 - cos(p, A) = 1 - 0.70711 = 0.29289: column 1 gains g, column 2 loses g / 2.
    """
    method = methods.CLVA(noise_layers=1, rho=0.5)
    carry = method.begin(context(COLUMNS, 1), jnp.zeros((1, 1, 1)))
    for layer, w in enumerate(
        (row([0.3, 0.1, 0.3, 0.3], [0.2, 0.3, 0.2, 0.3]), row([0.1, 0.6, 0.1, 0.2], [0.3, 0.3, 0.2, 0.2]))
    ):
        here = site(np.log(w), layer=layer, num_layers=3, carry=carry)
        carry = method.observe(here, jnp.asarray(w)[None])
    z = row([0, 0, 0, 0], [0, 0, 0, 0])
    got = method.logits(site(z, layer=2, num_layers=3, carry=carry), jnp.asarray(z)[None])
    close(got[0, :, 0], [[0, 0.29289, -0.14645, 0]] * 2)


VISTA = {
    # n(x) = (0.6, -0.8), cos(x, -v) = 0.8: + 0.5 * 1.8 (0, 1) = (0.6, 0.1), of length 0.60828:  5 (0.98639, 0.16440)
    "away from v": ("code", "mlp", [3, -4], [4.93197, 0.82199]),
    # cos(x, -v) = -0.8 counts as 0: + 0.5 (0, 1) = (0.6, 1.3), of length 1.43178:  5 (0.41906, 0.90796)
    "towards v": ("code", "mlp", [3, 4], [2.09529, 4.53980]),
    # h + 0.5 (0, 2) = (3, -3), of length 4.24264:  5 (0.70711, -0.70711)
    "paper": ("paper", "residual", [3, -4], [3.53553, -3.53553]),
}


@pytest.mark.parametrize(("variant", "stage", "x", "want"), VISTA.values(), ids=VISTA)
def test_vista(variant, stage, x, want):
    """Layer 1 of 2, v = (0, 2), λ 0.5."""
    seeing = jnp.asarray([[[0.0, 0.0]], [[1.0, 1.0]], [[1.0, 2.0]]])
    blind = jnp.asarray([[[0.0, 0.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    steering = methods.VISTA(lambda_=0.5, variant=variant).after_warm_up(WarmUp((seeing, blind))).branches()[0]
    place = (stream(1, 2),) if stage == "mlp" else (1, 2, "decode")
    close(getattr(steering, stage)(*place, jnp.asarray([[x]], jnp.float32))[0, 0], want)


def test_opera():
    """σ w of three answer tokens: 1; 2, 1; 3, 0.5, 1. Products 6, 0.5, 1: φ = 6 and c = 0; log p - α φ = -1 - 6."""
    method, products = methods.OPERA(variant="paper"), jnp.full((1, 3), -jnp.inf)
    for newest, w in enumerate(([0.02, 0, 0], [0.04, 0.02, 0], [0.06, 0.01, 0.02])):
        products = method.products(products, jnp.asarray([w]), jnp.int32(newest))
    close(jnp.exp(products[0]), [6, 0.5, 1])
    over_trust, column = method.over_trust(products, jnp.int32(2), jnp.asarray([0.25]))
    assert float(over_trust[0]) == pytest.approx(6, abs=1e-5) and int(column[0]) == 0
    gains = method.gains(jnp.asarray([[3.0]]), jnp.asarray([[-1.0]]), over_trust[None])
    close(gains, [[-7]])


def test_opera_code():
    """Of up to ten tokens φ is minus the image's weight; then 1e-7 p. ln(e^(ln 3 + 0.25) / (e^(ln 3 + 0.25) + 1))."""
    method, products = methods.OPERA(), jnp.log(jnp.asarray([[2e6, 3e6, 1.0]]))
    early, column = method.over_trust(products, jnp.int32(9), jnp.asarray([0.25]))
    assert float(early[0]) == -0.25 and int(column[0]) == 1
    late, _ = method.over_trust(products, jnp.int32(10), jnp.asarray([0.25]))
    assert float(late[0]) == pytest.approx(0.3, rel=1e-3)
    gains = method.gains(jnp.asarray([[np.log(3), 0.0]]), jnp.zeros((1, 2)), jnp.asarray([[-0.25, 0.0]]))
    # e^0.25 = 1.28403:  ln (3.85208 / 4.85208) = -0.23080   ln (1 / 4.85208) = -1.57941
    close(gains, [[-0.23080, -1.57941]])


def test_vti():
    """n(3, 4) = (0.6, 0.8), + 0.1 * 5 (0, 1) = (0.6, 1.3), of length 1.43178:  5 (0.41906, 0.90796)."""
    method = methods.VTI(lambda_=5, fitted=fitted("vti", directions=[[9.0, 9.0], [0.0, 2.0]]))
    here = stream(1, carry=jnp.asarray([True]))
    close(method.mlp(here, jnp.asarray([[[3.0, 4.0]]]))[0, 0], [2.09529, 4.53980])
    assert method.tower_edit() is None
    both = fitted("vti", directions=[[9.0, 9.0], [0.0, 2.0]], vision_directions=[[0.0, 0.5]])
    tower = methods.VTI(lambda_image=5, fitted=both).tower_edit()
    close(tower.mlp(0, jnp.asarray([[[3.0, 4.0]]]))[0, 0], [2.09529, 4.53980])


def test_nullu():
    """(3, 4) projected on (0.6, 0.8) has length 5; the rest is 0."""
    method = methods.Nullu(layers=(1,), fitted=fitted("nullu", directions=np.array([[[1.0, 0.0]], [[0.6, 0.8]]])))
    close(method.mlp(stream(1), jnp.asarray([[[3.0, 4.0], [0.8, -0.6]]]))[0], [[0, 0], [0.8, -0.6]])


def test_vhr():
    """Values are 1; head 1 has 1 with the image and 0 without, VHD 1, head 0 nothing: median 0.5, head 1 doubles.

    μ + σ of (0, 1) is 1, and 1 does not lie above it.
    """
    probe, seeing = methods.VHR(layers=(0,)).probe(), row([1, 0, 0, 0], [0, 1, 0, 0])
    blind = row([1, 0, 0, 0], [0, 0, 0, 0])
    here = site(seeing, carry=(jnp.asarray([True]),), values=np.ones((2, 4, 1)))
    here = dataclasses.replace(here, read_values=lambda: jnp.ones((2, 2, 4, 1)))
    carry = probe.observe(here, jnp.asarray([seeing, blind]))
    np.testing.assert_array_equal(carry[1], [[False, True]])
    close(methods.VHR().scaled(jnp.asarray(seeing)[None], carry[1])[0, :, 0], [[1, 0, 0, 0], [0, 2, 0, 0]])


@pytest.mark.parametrize(("blind", "strong"), [([0, 0, 0, 0], [2, 3]), ([0, 0, 0, 3], [1, 2])])
def test_vhr_outliers(blind, strong):
    """VHD (0, 1, 2, 9): μ + σ is 6.5; a head is an outlier, VHD 0, only if it is also one without the image."""
    seeing = [0, 1, 2**0.5, 3 + blind[3]]
    weights = jnp.asarray([row(*([x, 0, 0, 0] for x in seeing)), row(*([x, 0, 0, 0] for x in blind))])
    here = site(row(*[[0, 0, 0, 0]] * 4), carry=(jnp.asarray([True]),), values=np.ones((4, 4, 1)))
    here = dataclasses.replace(here, read_values=lambda: jnp.ones((2, 4, 4, 1)))
    _, chosen = methods.VHR(layers=(0,)).probe().observe(here, weights)
    assert np.flatnonzero(chosen[0]).tolist() == strong


def test_sparc():
    """Means 0.1 and 0.2; weights 0.3 and 0.3 rise by 2 and 0.5: column 1 jumps; its new mean is 0.9 * 0.3 + 0.01."""
    before = Jumps(jnp.asarray([[0, 0.1, 0.2, 0]]), jnp.asarray([[0.0, 2, 0, 0]]))
    method = methods.SPARC(selected_layer=0, jumps=before)
    here = dataclasses.replace(site(row([0, 0, 0, 0]), carry=before), phase="decode")
    w = jnp.asarray(row([0.2, 0.3, 0.3, 0.2]))[None]
    after = method.observe(here, w)
    close([after.mean[0], after.count[0]], [[0, 0.28, 0.29, 0], [0, 3, 0, 0]])
    close(method.weights(here, w)[0, :, 0], [[0.2, 0.363, 0.3, 0.2]])  # 0.3 * 1.1²


def test_memvr():
    """V = (1, 0): A(2, 1) = (2, 0), mean 1; FFN = (3, -1), mean 2, s = 2:  0.5 (3, -1) + 0.5 * 2 (2, 0)."""
    method = methods.MemVR(rho=0.5, layers=(0,))
    carry = Retrace(jnp.asarray([[[1.0, 0.0]]]), jnp.ones((1, 1, 1), bool), jnp.asarray([True]), jnp.asarray([True]))
    here = stream(1, mlp_input=jnp.asarray([[[2.0, 1.0]]]), carry=carry)
    close(method.mlp(here, jnp.asarray([[[3.0, -1.0]]]))[0, 0], [3.5, -0.5])


def test_only():
    """Mean 0.3, deviation 0.2: 0.6 is high. Then a token of each way; l~ = side + 0.5 l, d = Σ |p - p~|."""
    kept, entropy = drop_high_weights(jnp.asarray(row([0.2, 0.2, 0.2, 0.6])[None, :, 0]), jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(kept[0, 0], [True, True, True, False])
    close(entropy, [[np.log(3)]])
    method = methods.ONLY(tau=0.5, beta=0.1)
    main = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    side = jnp.asarray([[0.5, 0.0], [-2.0, 0.0]])
    readout = methods.Readout(main, None, side[None], (jnp.ones(2, bool), None))
    # l~ = (1, 0): d = 0:  1 + 3   0 + 0;  l~ = (-1, 0): p = (0.881, 0.119), p~ = (0.269, 0.731):  4 + 1, 0.135 > 0.1
    close(method.combine(readout, ())[0], [[4, 0], [5, 0]])


def test_every_method_is_here():
    names = {re.match(r"\w+", name)[0] for name in (*COMBINED, *STAGES)}
    assert names | set("sid capl causalmm clva opera memvr nullu only sparc vhr vti".split()) == set(methods.names())
