"""Changes that compile another program, and changes that must not."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from tests import checkpoints
from tests.checkpoints import IMAGE

# Two prompts: no other test of this package runs batches of two through these shapes.
LAYOUTS = [(5, IMAGE, 4), (7, IMAGE, 2)]


@contextlib.contextmanager
def traced():
    """Collects the names of the functions that JAX traces or compiles meanwhile."""
    names = []

    def listen(event, duration, **details):
        if event in ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/backend_compile_duration"):
            names.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def inputs(torch_model):
    return checkpoints.random_inputs(torch_model.config, seed=1, layouts=LAYOUTS)


@pytest.fixture(scope="module")
def generate(model, inputs):
    """generate(**changes): a sampled CMAC generation with some arguments changed; run once before any test."""

    def run(prompts=inputs, alpha=3.0, beta=0.2, gamma=2.0, **changes):
        settings = {"max_new_tokens": 6, "temperature": 0.7, "seed": 0} | changes
        return model.generate(prompts, methods.CMAC(alpha=alpha, beta=beta, gamma=gamma), **settings)

    run()
    # Arrays of a method are copied one by one before the prefill; JAX traces its own `copy` once for all.
    jnp.copy(jnp.float32(0))
    return run


def other_pixels(inputs):
    return inputs | {"pixel_values": inputs["pixel_values"] * 0.5 + 1}


def longer_prompts(inputs):
    """Five more tokens before the image and two after it, in the same bucket of columns and of last rows."""
    ids = inputs["input_ids"]
    first, rest = ids[:, :2], ids[:, 2:]
    ids = np.concatenate([first, np.full((2, 5), 9), rest, np.full((2, 2), 11)], axis=1)
    mask = np.pad(inputs["attention_mask"], ((0, 0), (0, 7)), constant_values=1)
    mask[:, :2] = inputs["attention_mask"][:, :2]
    return inputs | {"input_ids": ids, "attention_mask": np.where(ids == 0, 0, mask)}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"prompts": other_pixels},
        {"prompts": longer_prompts},
        {"seed": 12},
        {"temperature": 1.3},
        {"alpha": 1.5, "beta": 0.5, "gamma": 3.0},
        {"alpha": 1, "beta": 1, "gamma": 4},
        {"alpha": np.float64(0.5)},
        {"alpha": jnp.float32(2.0), "gamma": jnp.float32(1.5)},
        {"max_new_tokens": 1},
        {"max_new_tokens": 64},
    ],
    ids=lambda change: ", ".join(f"{key} {getattr(value, '__name__', value)}" for key, value in change.items()),
)
def test_no_program_is_traced_again(generate, inputs, change):
    if "prompts" in change:
        change = {"prompts": change["prompts"](inputs)}
    with traced() as names:
        generate(**change)
    assert names == []


def test_another_rule_of_sampling_is_another_program(generate):
    with traced() as names:
        generate(top_k=5)
    assert names != []


def test_with_and_without_a_method_are_two_programs(model, generate, inputs):
    settings = {"max_new_tokens": 6, "temperature": 0.7}
    with traced() as names:
        plain = model.generate(inputs, **settings)
    assert names != []
    with traced() as names:
        assert generate().tokens != plain.tokens
        assert model.generate(inputs, **settings) == plain
    assert names == []
