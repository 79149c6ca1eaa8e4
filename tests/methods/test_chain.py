"""Several methods at once."""

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import CMAC, EAH, PAI, SEVI, VAF, VCD, DoLa, MiddleLayers, chain

SMALL = {"start_layer": 0, "end_layer": None}


def steps(model, prompt, method, count=3):
    """Main, contrast (or None) and combined logits of a prefill and some decoded tokens."""
    state, step = model.prefill(prompt, method, 41 + 64)
    seen = [step]
    for token in range(count):
        state, step = model.decode(state, np.full(3, 5 + token, np.int32))
        seen.append(step)
    return [
        None if getattr(seen[0], name) is None else np.stack([np.asarray(getattr(one, name)) for one in seen])
        for name in ("main", "contrast", "combined")
    ]


def test_edits_hold_on_both_branches_of_one_prompt(model, mixed):
    """MiddleLayers with CMAC: the main branch is MiddleLayers' own, the contrast is edited by both."""
    edit = MiddleLayers(alpha=2.0, **SMALL)
    main, contrast, combined = steps(model, mixed, chain(edit, CMAC(cmpc=False)))
    alone = steps(model, mixed, edit)[0]
    np.testing.assert_allclose(main, alone, rtol=0, atol=1e-5)
    unedited = steps(model, mixed, CMAC(cmpc=False))
    assert np.abs(contrast - unedited[1]).max() > 1e-3
    kept = np.isfinite(combined)
    np.testing.assert_allclose(combined[kept], (4 * main - 3 * contrast)[kept], rtol=0, atol=1e-4)


def test_a_branch_with_its_own_prompt_is_left_alone(model, mixed):
    edit = VAF(enhance=2.0, suppress=0.5, **SMALL)
    _, contrast, combined = steps(model, mixed, chain(edit, VCD(noise_step=900)))
    _, alone, without = steps(model, mixed, VCD(noise_step=900))
    np.testing.assert_allclose(contrast, alone, rtol=0, atol=1e-5)
    kept = np.isfinite(combined) & np.isfinite(without)
    assert np.abs(combined[kept] - without[kept]).max() > 1e-3


def test_a_member_keeps_to_its_own_rows(model, mixed):
    """EAH edits all rows of the prompt; a member for the last row still edits only the last row."""
    last = MiddleLayers(alpha=4.0, **SMALL)
    nothing = EAH(beta=1e9, layer=0)
    together = steps(model, mixed, chain(nothing, last))[0]
    np.testing.assert_allclose(together, steps(model, mixed, last)[0], rtol=0, atol=1e-5)


IDLE = VAF(enhance=1.0, suppress=1.0, **SMALL)
RETRACED = methods.MemVR(layers=(0,), tau=0.1, rho=0.0)  # remembers image tokens, and changes nothing
EDITS = [
    methods.SPARC(alpha=5.0, tau=0.02, selected_layer=0),
    methods.VAR(layers=(0, 1), tau=1.7, p=0.2, rho=0.9),
    methods.VHR(layers=(0, 1), alpha=3.0),
    methods.ONLY(tau=1.0),
]


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        (CMAC(variant="code", cmpc=False, alpha=1.0), IDLE),  # which combines
        # Without CICD SEVI has no contrast branch, so VCD's pictures are used.
        pytest.param(VCD(), SEVI(omega=0.0, start_layer=0), marks=pytest.mark.slow),
        *(pytest.param(method, RETRACED, marks=pytest.mark.slow) for method in EDITS),
    ],
    ids=lambda method: method.label,
)
def test_memory_and_carry_reach_each_member(model, mixed, method, idle):
    wanted = steps(model, mixed, method)
    for order in ((idle, method), (method, idle)):
        for got, want in zip(steps(model, mixed, chain(*order)), wanted, strict=True):
            if want is not None:
                kept = np.isfinite(want)
                np.testing.assert_allclose(got[kept], want[kept], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((VCD(), PAI(start_layer=0)), "VCD and PAI cannot be chained: each needs its own contrast branch"),
        ((CMAC(), DoLa()), "CMAC and DoLa cannot be chained: each needs its own combination of logits"),
        ((CMAC(), methods.DeCo(layers=(60, 70))), "each needs its own combination of logits"),
        ((CMAC(imd=False), CMAC(imd=False)), "each needs its own positions"),
        ((), "at least one method"),
    ],
)
def test_contradictions_are_refused(members, message):
    with pytest.raises(LVLMError, match=message):
        chain(*members)


def test_chains_are_flat_and_take_the_layers_of_deep_models():
    method, inner = CMAC(), chain(VAF(), MiddleLayers())
    assert chain(method) is method
    assert [type(one) for one in chain(EAH(), inner).members] == [EAH, VAF, MiddleLayers]
    assert chain(EAH(), inner).label == "EAH + VAF + MiddleLayers" and "chained" not in methods.names()
    assert chain(EAH(), methods.DeCo(layers=(60, 70))).exits(80) == (60, 70)
