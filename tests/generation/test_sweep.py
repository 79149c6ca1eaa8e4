"""A grid of strengths in one program gives what each setting gives alone."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import sweep
from tests.slow import named

GRIDS = {
    "cmac": [methods.CMAC(alpha=a, gamma=g) for a, g in ((0.0, 1.0), (3.0, 2.0), (8.0, 0.5))],
    "vcd": [methods.VCD(alpha=4.0, noise_step=t) for t in (0, 900)],
    "avisc": [methods.AvisC(alpha=4.0, lambda_=a) for a in (-1.0, 1.0)],  # other tokens of the contrast branch
}
SLOW = {
    "middle_layers": [methods.MiddleLayers(alpha=a, start_layer=0) for a in (0.0, 9.0)],
    "pai": [methods.PAI(alpha=a, start_layer=0) for a in (0.0, 5.0)],
    "vhr": [methods.VHR(alpha=a, layers=(0, 1)) for a in (1.0, 6.0)],  # a probe of each setting
    "sparc": [methods.SPARC(alpha=a, tau=0.02, selected_layer=0) for a in (1.0, 9.0)],  # memory of the edits
    "damro": [methods.DAMRO(alpha=a, tokens=2) for a in (0.0, 4.0)],
    "ritual": [methods.RITUAL(alpha=4.0, seed=a) for a in (0, 1)],
}


@pytest.mark.parametrize("name", named(GRIDS | SLOW, SLOW))
def test_a_sweep_equals_one_generation_after_another(model, mixed, name):
    grid = (GRIDS | SLOW)[name]
    together = model.sweep(mixed, grid, max_new_tokens=12)
    alone = [model.generate(mixed, method=method, max_new_tokens=12) for method in grid]
    assert [out.tokens for out in together] == [out.tokens for out in alone]
    assert [out.finish_reason for out in together] == [out.finish_reason for out in alone]
    for got, want in zip(together, alone, strict=True):
        for ours, theirs in zip(got.logprobs, want.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert together[0].tokens != together[-1].tokens  # the strengths do something


def test_another_grid_of_the_same_size_compiles_nothing(model, mixed, all_programs_kept):
    model.sweep(mixed, [methods.CMAC(alpha=a) for a in (1.0, 2.0)], max_new_tokens=4)
    before = sweep.run._cache_size()
    model.sweep(mixed, [methods.CMAC(alpha=a, beta=0.3) for a in (0.5, 4.0)], max_new_tokens=4)
    assert sweep.run._cache_size() == before


def test_switches_cannot_be_swept(model, mixed):
    grid = [methods.CMAC(), dataclasses.replace(methods.CMAC(), imd=False)]
    with pytest.raises(LVLMError, match="got 2 structures"):
        model.sweep(mixed, grid, max_new_tokens=2)
