"""Training runs small enough to be repeated on many meshes: a LLaVA in miniature, and a real one of two layers."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lvlm_jax import LVLM, models
from lvlm_jax.pocket import recipe_losses as sft
from lvlm_jax.training import loop
from lvlm_jax.training.losses import cross_entropy
from lvlm_jax.weights import parts
from tests.training.line import records

ROWS, TOKENS, TEXT = 8, 40, 3
WORDS, IMAGE_TOKEN, PATCHES, WIDTH = 64, 63, 16, 16
TRAINED = "^(language_model|connector)/"


class Talk:
    """One image and a ragged answer in each row of random tokens.

    Args:
        images: shape of the array of one image.
        seconds: that a batch takes, to leave time for being killed.
    """

    def __init__(self, images, image_token=IMAGE_TOKEN, patches=PATCHES, seconds=0.0):
        self.images, self.image_token, self.patches, self.seconds = images, image_token, patches, seconds

    def __call__(self, step):
        time.sleep(self.seconds)
        rng = np.random.default_rng([7, step])
        tokens = rng.integers(3, WORDS - 1, (ROWS, TOKENS), dtype=np.int32)
        tokens[:, TEXT : TEXT + self.patches] = self.image_token
        begin = TEXT + self.patches + 2
        columns, end = np.arange(TOKENS), rng.integers(begin + 1, TOKENS + 1, (ROWS, 1))
        images = rng.normal(size=(ROWS, *self.images)).astype(np.float32)
        return {"tokens": tokens, "answers": (columns >= begin) & (columns < end), "images": images}


def miniature():
    """(parameters, objective): tower and connector of one layer each, a decoder that looks at running means."""
    rng = np.random.default_rng(0)

    def kernel(*shape):
        return {"kernel": rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])}

    embedding = rng.normal(size=(WORDS, WIDTH)).astype(np.float32)
    params = {
        "vision_tower": {"patch_embedding": kernel(8, 8)},
        "connector": {"linear_1": kernel(8, 32), "linear_2": kernel(32, WIDTH)},
        "language_model": {
            "embed_tokens": {"embedding": embedding},
            "layers_0": {"mlp": {"up_proj": kernel(WIDTH, 32), "down_proj": kernel(32, WIDTH)}},
            "lm_head": kernel(WIDTH, WORDS),
        },
    }

    def objective(trainable, frozen, batch, key):
        whole = parts.join(trainable, frozen)
        tower, connector, decoder = whole["vision_tower"], whole["connector"], whole["language_model"]
        seen = batch["images"] @ tower["patch_embedding"]["kernel"]
        seen = jax.nn.gelu(seen @ connector["linear_1"]["kernel"]) @ connector["linear_2"]["kernel"]
        tokens = batch["tokens"]
        order = jnp.cumsum((tokens == IMAGE_TOKEN).reshape(-1)).reshape(tokens.shape) - 1
        shown = seen.reshape(-1, WIDTH)[order]
        words = decoder["embed_tokens"]["embedding"][tokens]
        x = jnp.where((tokens == IMAGE_TOKEN)[..., None], shown, words)
        x += jnp.cumsum(x, axis=1) / (1 + jnp.arange(TOKENS))[:, None]
        mlp = decoder["layers_0"]["mlp"]
        x += jax.nn.silu(x @ mlp["up_proj"]["kernel"]) @ mlp["down_proj"]["kernel"]
        logits = x @ decoder["lm_head"]["kernel"]
        return {"loss": cross_entropy(logits[:, :-1], tokens[:, 1:], batch["answers"][:, 1:])}

    return params, objective


def settings(**changes):
    fields = dict(peak=1e-2, final=0.1, warmup=2, clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.01)
    fields |= dict(steps=20, workers=0, log_every=1, evaluate_every=100, save_every=100, keep=1)
    return ConfigDict(fields | changes)


def train(mesh, workdir, seconds=0.0, **changes):
    """The trained parameters of the miniature, all but its tower."""
    params, objective = miniature()
    task = loop.Task("talk", objective, {"loss": 1.0}, Talk((PATCHES, 8), seconds=seconds), None)
    return loop.train(task, *parts.split(params, TRAINED), settings(**changes), workdir, mesh)


def train_model(folder, mesh, workdir):
    """The same of a checkpoint."""
    model = LVLM.from_pretrained(folder, mesh=mesh)
    config, module = model.config, models.build(model.config)

    def objective(trainable, frozen, batch, key):
        params = parts.join(trainable, frozen)
        image_tokens = module.apply({"params": params}, batch["images"], method="encode_images")
        return sft.answer_metrics(sft.next_token_logits(module, params, batch["tokens"], image_tokens), batch)

    size = config.vision.image_size
    source = Talk((3, size, size), config.image_token_id, config.tokens_per_image)
    task = loop.Task("talk", objective, {"loss": 1.0}, source, None)
    return loop.train(task, *parts.split(model.params, TRAINED), settings(), workdir, mesh)


def losses(workdir):
    """Of every step."""
    return [record["objective"] for record in records(workdir)]
