"""Checks that methods that are switched off, or have strength zero, leave a model unchanged."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lvlm_jax import LVLM, methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.verification.results import Result, compared

NAME = "methods off"
TOLERANCE = 1e-4  # relative to the largest logit; strengths of zero may still change the order of sums
STEPS = 2  # decoding steps after the prompt

_NO_CUT = 1e-30  # a plausibility cut that excludes nothing
# Method -> the strengths at which it does nothing.
NO_STRENGTH: dict[str, dict[str, Any]] = {
    "adaiat": {"alpha": 0.0},
    "adhh": {"tau": 1.1},
    "avisc": {"alpha": 0.0, "beta": _NO_CUT},
    "capl": {"sigma": 0.0},
    "causalmm": {"gamma": 0.0, "beta": _NO_CUT},
    "clva": {"a": 0.0, "b": 0.0},
    "cmac": {"alpha": 0.0, "beta": _NO_CUT, "gamma": 1.0},
    "dab": {"alpha": 0.0},
    "damro": {"alpha": 0.0, "beta": _NO_CUT},
    "deco": {"alpha": 0.0},
    "dola": {"beta": 1.0},
    "eah": {"beta": 1e9},
    "farsight": {"sigma": 1e9},
    "iat": {"alpha": 0.0},
    "icd": {"alpha": 0.0, "beta": _NO_CUT},
    "m3id": {"decay": 0.0},
    "memvr": {"rho": 0.0},
    "middle_layers": {"alpha": 0.0},
    "nolan": {"kappa": 0.0},
    "nullu": {"alpha": 0.0},
    "only": {"alpha_complement": 0.0, "alpha_contrast": 0.0, "beta": _NO_CUT},
    "pai": {"alpha": 0.0, "gamma": 1.0, "beta": _NO_CUT},
    "ritual": {"alpha": 0.0, "beta": _NO_CUT},
    "sevi": {"omega": 0.0, "alpha_max": 0.0, "beta": _NO_CUT},
    "sid": {"alpha": 0.0, "beta": _NO_CUT},
    "sparc": {"alpha": 1.0},
    "spin": {"scale": 1.0},
    "vaf": {"enhance": 1.0, "suppress": 1.0},
    "var": {"p": 1.0},
    "vcd": {"alpha": 0.0, "beta": _NO_CUT},
    "vhr": {"alpha": 1.0},
    "vista": {"lambda_": 0.0, "gamma": 0.0},
    "vti": {"lambda_": 0.0},
}


def check(model: LVLM, prompt: Inputs, names: tuple[str, ...]) -> Result:
    """Runs each method at strength zero, and the model without a method before and after it.

    Args:
        names: names of the methods.
    """
    forced = _steps(model, prompt, None, None)[1]
    plain, _ = _steps(model, prompt, None, forced)
    scale = max(1.0, max(float(np.abs(step).max()) for step in plain))
    checked, left_out, exact, largest, faults = [], {}, [], 0.0, []
    for name in names:
        try:
            if name not in NO_STRENGTH:
                raise LVLMError("it has no strength that can be set to zero")
            method = methods.get(name)(**NO_STRENGTH[name])
            with_method, _ = _steps(model, prompt, method, forced)
        except LVLMError as error:
            left_out[name] = str(error)
            continue
        checked.append(name)
        afterwards, _ = _steps(model, prompt, None, forced)
        if not all(np.array_equal(*pair) for pair in zip(afterwards, plain, strict=True)):
            faults.append(f"after {name} the model without a method answers otherwise")
        difference = max(float(np.abs(one - other).max()) for one, other in zip(with_method, plain, strict=True))
        exact += [name] if difference == 0 else []
        largest = max(largest, difference)
        if difference > TOLERANCE * scale:
            faults.append(f"{name} without strength changes logits by {difference:.2g}")
    words = (
        f"after each of {len(checked)} methods the model without one gives the same bits; with strengths of zero "
        f"{len(exact)} give them too, and logits differ by {largest:.1g} at most"
    )
    if left_out:
        words += f"; left out: {', '.join(f'{name} ({why})' for name, why in left_out.items())}"
    return compared(NAME, faults, words, ran=checked, same_bits=exact, largest_difference=largest, left_out=left_out)


def _steps(model: LVLM, prompt: Inputs, method: methods.Method | None, forced: Any) -> tuple[list[np.ndarray], list]:
    """The main branch's logits after the prompt and after each token, and these tokens.

    Args:
        forced: the tokens of each step; None for the likeliest tokens.
    """
    state, step = model.prefill(prompt, method=method, max_length=int(prompt.lengths.max()) + STEPS + 1)
    logits, chosen_tokens = [np.asarray(step.main)], []
    for number in range(STEPS):
        tokens = np.asarray(step.main).argmax(-1) if forced is None else forced[number]
        chosen_tokens.append(tokens)
        state, step = model.decode(state, jnp.asarray(tokens, jnp.int32))
        logits.append(np.asarray(step.main))
    return logits, chosen_tokens
