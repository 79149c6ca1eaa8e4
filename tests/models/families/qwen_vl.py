"""Qwen-VL of 2023, as the authors publish it: transformers has no class, so names and shapes are written out here."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import IMAGE
from tests.models.families.base import Family, merged, normal
from tests.reference import qwen_vl as reference

# `config.json` of Qwen/Qwen-VL-Chat; Qwen/Qwen-VL differs in nothing that says how the model computes.
PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "qwen_vl.json").read_text())


class QwenVl(Family):
    """Configurations are dicts, "transformers' model" is a configuration and tensors in float64 for the reference."""

    layouts = Family.layouts | {"one_image": [(4, IMAGE, 6)]}
    pictures = ()  # the processor is our own
    word, new_tokens, distinct = 400, 16, 6
    refused_layout = (4, IMAGE, 6)
    refused_arrays = [
        (lambda a: {"input_ids": a["input_ids"][:, :12], "attention_mask": None}, "1 <img> and 0 </img>"),
        (lambda a: {"input_ids": a["input_ids"][:, ::-1]}, "not in pairs"),
        (lambda a: {"pixel_values": a["pixel_values"][..., :-2]}, "pixel_values has shape"),
        (lambda a: {"pixel_values": a["pixel_values"] * np.nan}, "NaN"),
        (lambda a: {"input_ids": np.delete(a["input_ids"], 6, axis=1), "attention_mask": None}, "15 image tokens"),
        (lambda a: {"pixel_values": None}, "give one image for each"),
    ]

    def config(self, **overrides):
        return merged(PUBLISHED | self.rest, overrides)

    def raw(self):
        return self.config()

    def build(self, folder, seed=11, **overrides):
        config = self.config(**overrides)
        weights = random_weights(config, seed)
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return SimpleNamespace(config=config, weights={name: tensor.double() for name, tensor in weights.items()})

    def load(self, folder):
        weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        return SimpleNamespace(config=json.loads((folder / "config.json").read_text()), weights=weights), {}

    def image(self, config, part):
        """<img>, its slots, </img>."""
        start = config["visual"]["image_start_id"]
        return [start, *[start + 2] * config["visual"].get("n_queries", 256), start + 1]

    def pixels(self, config, generator, images):
        side = config["visual"]["image_size"]
        return {"pixel_values": normal(generator, sum(map(len, images)), 3, side, side)}

    def samples(self, config, inputs):
        """(ids without padding, pixels of its images) of each sample."""
        taken, rows = 0, []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            count = int((ids == config["visual"]["image_start_id"]).sum())
            rows.append((ids[mask.astype(bool)], inputs["pixel_values"][taken : taken + count] if count else ()))
            taken += count
        return rows

    def logits(self, theirs, inputs):
        samples = self.samples(theirs.config, inputs)
        return [reference.logits(theirs.weights, theirs.config, ids, pixels) for ids, pixels in samples]

    def greedy(self, theirs, inputs):
        """Each token is the reference's most likely one after those before it."""
        answers = []
        for ids, pixels in self.samples(theirs.config, inputs):
            steps = []
            for _ in range(self.new_tokens):
                steps.append(np.asarray(reference.logits(theirs.weights, theirs.config, ids, pixels))[-1])
                ids = np.append(ids, steps[-1].argmax())
            answers.append((ids[-self.new_tokens :], np.stack(steps)))
        return tuple(map(np.stack, zip(*answers, strict=True)))


def tensor_shapes(config):
    """Published tensor name -> shape of a config.json, written out from the published modules."""
    width, mlp, bias = config["hidden_size"], config["intermediate_size"] // 2, not config["no_bias"]
    shapes = {"transformer.wte.weight": (config["vocab_size"], width), "transformer.ln_f.weight": (width,)}

    def linear(name, inputs, outputs, has_bias):
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)

    def layer_norm(name, size):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    for index in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{index}"
        shapes[f"{layer}.ln_1.weight"] = shapes[f"{layer}.ln_2.weight"] = (width,)
        linear(f"{layer}.attn.c_attn", width, 3 * width, True)
        linear(f"{layer}.attn.c_proj", width, width, bias)
        linear(f"{layer}.mlp.w1", width, mlp, bias)
        linear(f"{layer}.mlp.w2", width, mlp, bias)
        linear(f"{layer}.mlp.c_proj", mlp, width, bias)
    visual, tower = config["visual"], "transformer.visual"
    size, patch, queries = visual["width"], visual["patch_size"], visual.get("n_queries", 256)
    shapes[f"{tower}.conv1.weight"] = (size, 3, patch, patch)
    shapes[f"{tower}.positional_embedding"] = (256, size)
    layer_norm(f"{tower}.ln_pre", size)
    for index in range(visual["layers"]):
        block = f"{tower}.transformer.resblocks.{index}"
        layer_norm(f"{block}.ln_1", size)
        layer_norm(f"{block}.ln_2", size)
        linear(f"{block}.attn.in_proj", size, 3 * size, True)
        linear(f"{block}.attn.out_proj", size, size, True)
        linear(f"{block}.mlp.c_fc", size, int(size * visual["mlp_ratio"]), True)
        linear(f"{block}.mlp.c_proj", int(size * visual["mlp_ratio"]), size, True)
    pool, output = f"{tower}.attn_pool", visual["output_dim"]
    shapes[f"{pool}.pos_embed"] = shapes[f"{pool}.query"] = (queries, output)
    if size != output:
        linear(f"{pool}.kv_proj", size, output, False)
    shapes[f"{pool}.attn.in_proj_weight"] = (3 * output, output)
    shapes[f"{pool}.attn.in_proj_bias"] = (3 * output,)
    linear(f"{pool}.attn.out_proj", output, output, True)
    layer_norm(f"{pool}.ln_q", output)
    layer_norm(f"{pool}.ln_kv", output)
    layer_norm(f"{tower}.ln_post", output)
    shapes[f"{tower}.proj"] = (output, output)
    if not config["tie_word_embeddings"]:
        linear("lm_head", width, config["vocab_size"], False)
    return shapes


def random_weights(config, seed):
    """Tensors of a config.json, float32, wide enough for peaked attention and spread-out logits."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        fan_in = values[0].numel() if len(shape) > 1 else 1
        if name == "transformer.ln_f.weight":
            values = values.sign()  # with tied embeddings a token would otherwise mostly predict itself
        elif ".ln_" in name:
            values = 0.1 * values + float(name.endswith("weight"))
        elif name.endswith("bias"):
            values = 0.2 * values
        elif "c_attn" in name or "in_proj" in name:
            values = 1.4 * values / fan_in**0.5  # attention logits of standard deviation near 2
        elif name == "lm_head.weight":
            values = 2.5 * values / fan_in**0.5
        elif name == "transformer.wte.weight":
            values = 0.4 * values
        elif name.endswith(("positional_embedding", "pos_embed", "query")):
            values = 0.5 * values
        else:
            values = values / fan_in**0.5
        weights[name] = values
    return weights


QWEN_VL = QwenVl("qwen_vl")
