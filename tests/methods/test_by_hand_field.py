"""Numbers of the methods of the field, worked out by hand; columns and sites as in `test_by_hand`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods.fitted import Fitted, Source
from lvlm_jax.methods.memvr import Retrace
from lvlm_jax.methods.only import lowered
from lvlm_jax.methods.sparc import Jumps
from tests.methods.compare import stream
from tests.methods.test_by_hand import COLUMNS, close, row, site

TWO = row([0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.2, 0.5])
FIELD = {
    # ⌈0.5 * 2⌉ = 1 of two heads stays; masses on the image 0.4 and 0.4: the earlier. Head 1 times 0.1.
    "spin": (methods.SPIN(rho=0.5, scale=0.1), COLUMNS, [TWO[0, 0], 0.1 * TWO[1, 0]]),
    # Images of one token each: r = 0.1, 0.3 and 0.2, 0.2; means 0.2:  - 0.5 * (-0.1), - 0.5 * 0.1
    "dab": (methods.DAB(), (0, 1, 2, 0), [[0.4, 0.15, 0.25, 0.2], TWO[1, 0]]),
    # Column 1 is a sink: shares 0.1 of 0.4 and 0.2 of 0.4, both centric. 0.4 * 0.1 = 0.04 and 0.08 go to column 2.
    "var": (methods.VAR(), COLUMNS, [[0.4, 0.06, 0.34, 0.2], [0.1, 0.12, 0.28, 0.5]]),
    # A mass of 0.4 is less than 0.5: no head is centric.
    "var, mass": (methods.VAR(least=0.5), COLUMNS, TWO[:, 0]),
}


@pytest.mark.parametrize(("method", "image_id", "want"), FIELD.values(), ids=FIELD)
def test_weights_of_the_last_row(method, image_id, want):
    here = site(np.log(TWO), image_id, carry=(jnp.asarray([[False, True, False, False]]),))
    close(method.weights(here, jnp.asarray(TWO)[None])[0, :, 0], want)


def test_adhh():
    """Text behind the image has 0.2 and 0.5: of the listed heads 0 and 1 of layer 2 only head 1 reaches 0.4."""
    method = methods.ADHH(heads=(2, 0, 2, 1))
    close(method.weights(site(np.log(TWO), layer=2), jnp.asarray(TWO)[None])[0, :, 0], [TWO[0, 0], [0.1, 0.2, 0.2, 0]])


def fitted(word, **arrays):
    return Fitted({name: jnp.asarray(array) for name, array in arrays.items()}, Source(word, "", "", ""))


def test_adaiat():
    """One generated column: 0.2 + 0.5 < 1. Factors 1 + 6 (1.5 - 1) = 4 and 1: (0.4, 0.1, 0.3, 0.8) / 1.6."""
    method = methods.AdaIAT(fitted=fitted("adaiat", ratios=[[1.5, 1.0]], thresholds=[1.0]))
    here = dataclasses.replace(site(TWO), generated=jnp.asarray([[False, False, False, True]]), phase="decode")
    close(method.weights(here, jnp.asarray(TWO)[None])[0, :, 0], [[0.25, 0.0625, 0.1875, 0.5], TWO[1, 0]])


def test_vti():
    """n(3, 4) = (0.6, 0.8), + 0.1 * 5 (0, 1) = (0.6, 1.3), of length 1.43178:  5 (0.41906, 0.90796)."""
    method = methods.VTI(lambda_=5, fitted=fitted("vti", directions=[[9.0, 9.0], [0.0, 2.0]]))
    here = stream(1, carry=jnp.asarray([True]))
    close(method.mlp(here, jnp.asarray([[[3.0, 4.0]]]))[0, 0], [2.09529, 4.53980])


def test_nullu():
    """(3, 4) along (0.6, 0.8) is 5: nothing is left of it."""
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


def test_iat():
    """Generated is the last column alone: |z| 1 and 0."""
    z = row([1, 2, -4, 1], [0, 4, 2, 0])
    here = dataclasses.replace(site(z), generated=jnp.asarray([[False, False, False, True]]), phase="decode")
    close(methods.IAT().logits(here, jnp.asarray(z)[None])[0, :, 0], [[1, 2, -4, 1.8], [0, 4, 2, 0]])


def test_farsight():
    """σ = ln 2, all logits 0: the third of four rows has a register of 1/2 beside 3: its weights are (1/3) 3 / 3.5."""
    z, w = np.zeros((1, 4, 4)), np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    got = methods.FarSight(sigma=np.log(2)).weights(site(z), jnp.asarray(w, jnp.float32)[None, None])
    close(got[0, 0, 2:], [[0.28571, 0.28571, 0.28571, 0], [0.25] * 4])


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
    here = stream(1, read=jnp.asarray([[[2.0, 1.0]]]), carry=carry)
    close(method.mlp(here, jnp.asarray([[[3.0, -1.0]]]))[0, 0], [3.5, -0.5])


def test_only():
    """Mean 0.3, deviation 0.2: 0.6 is high. Then a token of each way; l~ = side + 0.5 l, d = Σ |p - p~|."""
    kept, entropy = lowered(jnp.asarray(row([0.2, 0.2, 0.2, 0.6])[None, :, 0]), jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(kept[0, 0], [True, True, True, False])
    close(entropy, [[np.log(3)]])
    method = methods.ONLY(tau=0.5, beta=0.1)
    main = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    side = jnp.asarray([[0.5, 0.0], [-2.0, 0.0]])
    readout = methods.Readout(main, None, None, (jnp.ones(2, bool), side))
    # l~ = (1, 0): d = 0:  1 + 3   0 + 0;  l~ = (-1, 0): p = (0.881, 0.119), p~ = (0.269, 0.731):  4 + 1, 0.135 > 0.1
    close(method.combine(readout, ())[0], [[4, 0], [5, 0]])
