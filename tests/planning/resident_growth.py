"""Run by `test_plan` in a separate process: the growth of a process in a job, measured and planned.

Argument: "answer" or "learn". The model has LLaVA's shape, with weights that are all of one value: 680 MB that answer,
320 MB that learn.
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lvlm_jax import LVLM, models, parallel
from lvlm_jax.planning import compilers, plan
from lvlm_jax.planning import training as plan_training
from lvlm_jax.training import optimizer, placement, settings
from lvlm_jax.training.objectives import sft
from lvlm_jax.training.step import State, make_step
from lvlm_jax.weights import parts

HF = dict(
    model_type="llava", image_token_index=4,
    vision_config=dict(model_type="clip_vision_model", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, image_size=56, patch_size=14),
    text_config=dict(model_type="llama", hidden_size=1024, intermediate_size=2816,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=8000, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=None, pad_token_id=0),
)  # fmt: skip
LAYERS = {"answer": 12, "learn": 5}
PROMPT, BATCH = 448, 8


def config_of(layers: int):
    """The model's configuration with another number of decoder layers."""
    return models.config_from_hf(HF | {"text_config": HF["text_config"] | {"num_hidden_layers": layers}})


def number(file: str, field: str) -> int:
    """Bytes, from a file about this process."""
    found = re.search(rf"^{field}:\s+(\d+)( kB)?", Path("/proc/self", file).read_text(), re.M)
    return int(found[1]) * (1024 if found[2] else 1)


def begin_anew() -> int:
    """Returns free memory to the system, resets the peak, and returns the resident size."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return number("status", "VmRSS")


def growth(work) -> int:
    """The most that memory grows by in a second run: in the first one programs are compiled."""
    work()
    before = begin_anew()
    work()
    return number("status", "VmHWM") - before


def made(shapes):
    """Arrays of these shapes."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype, device=leaf.sharding), shapes)


def answering(job):
    config, images = job.config, job.config.tokens_per_image
    tokens, size = np.full((BATCH, PROMPT), 5), config.vision.image_size
    tokens[:, 8 : 8 + images] = config.image_token_id
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    inputs["pixel_values"] = np.zeros((BATCH, 3, size, size), np.float32)

    def work():
        model = LVLM(made(models.abstract_parameters(config)), config)
        model.generate(inputs, max_new_tokens=job.new_tokens)

    return work


def learning(job):
    mesh, defaults = parallel.make_mesh(1, 1, 1), settings.base()
    transformation = optimizer.make(ConfigDict({**defaults.optimizer, "steps": 10}))
    module = models.build(job.config)
    shapes = models.abstract_parameters(job.config)
    shapes = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes, placement.of_parameters(shapes, mesh),
    )  # fmt: skip
    batch = made(plan_training.batch(job, job.config, mesh))
    template = placement.of_state(parts.split(shapes, job.training.train)[0], transformation, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)

    def objective(*given):
        return sft.metrics(module, *given)

    step = make_step(objective, {"loss": 1.0}, transformation, 0, 1, (shardings, placement.everywhere(mesh)))

    def work():
        trainable, frozen = parts.split(made(shapes), job.training.train)
        own = jax.tree.map(lambda leaf: leaf.copy(), trainable)  # as the loop does
        moments = jax.jit(transformation.init, out_shardings=shardings.optimizer)(own)
        state = State(jax.device_put(np.int32(0), shardings.step), own, moments)
        with jax.set_mesh(mesh):
            jax.block_until_ready(step(state, frozen, batch))

    return work


def main(kind: str) -> None:
    job = plan.Job(kind, config_of(LAYERS[kind]), 1, (1, 1, 1), "float32", BATCH, prompt_tokens=PROMPT, new_tokens=64)
    job = job.replaced(training=plan.Training("sft", lora=False)) if kind == "learn" else job
    real = growth((learning if kind == "learn" else answering)(job))
    print(json.dumps({"plan": plan.plan(job, compilers.HERE).total, "real": real}))


if __name__ == "__main__":
    main(*sys.argv[1:])
