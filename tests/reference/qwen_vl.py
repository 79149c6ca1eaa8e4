"""Qwen-VL (2023) in plain torch float64: one sample at a time, no batching, no padding, no cache.

Written from the published architecture (arXiv 2308.12966 and the repositories Qwen/Qwen-VL). Every function takes
`weights`, the checkpoint's tensors in float64 under their published names, and `config`, the dict of `config.json`.

Letters: T rows, H heads, D head dim, P patches, Q image tokens, E width of the decoder, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

VISUAL = "transformer.visual"


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights, name, x):
    weight = weights[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], eps=1e-6)


def rms_norm(config, weights, name, x):
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"])
    return x * scale * weights[f"{name}.weight"]


def grid_positions(table, places):
    """A table of [N·N, W] positions for a square of `places` patches, by bicubic interpolation."""
    source, target = math.isqrt(len(table)), math.isqrt(places)
    if source == target:
        return table
    grid = table.T.reshape(1, -1, source, source)
    resized = F.interpolate(grid, size=(target, target), mode="bicubic", align_corners=False)
    return resized.reshape(-1, places).T


def patch_features(weights, visual, pixels):
    """The tower's output [P, W] for one image [3, height, width]."""
    kernel = weights[f"{VISUAL}.conv1.weight"]
    x = F.conv2d(pixels[None], kernel, stride=visual["patch_size"])[0].flatten(1).T
    x = x + grid_positions(weights[f"{VISUAL}.positional_embedding"], len(x))
    x = layer_norm(weights, f"{VISUAL}.ln_pre", x)
    heads = visual["heads"]
    for index in range(visual["layers"]):
        name = f"{VISUAL}.transformer.resblocks.{index}"
        fused = linear(weights, f"{name}.attn.in_proj", layer_norm(weights, f"{name}.ln_1", x))
        # Of each head its query, its key, its value.
        q, k, v = fused.reshape(len(x), heads, 3, -1).permute(2, 1, 0, 3)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        mixed = (scores @ v).permute(1, 0, 2).flatten(1)
        x = x + linear(weights, f"{name}.attn.out_proj", mixed)
        hidden = F.gelu(linear(weights, f"{name}.mlp.c_fc", layer_norm(weights, f"{name}.ln_2", x)))
        x = x + linear(weights, f"{name}.mlp.c_proj", hidden)
    return x


def image_tokens(weights, config, pixels):
    """The Q image tokens [Q, E] of one image."""
    visual, pool = config["visual"], f"{VISUAL}.attn_pool"
    x = patch_features(weights, visual, pixels)
    if f"{pool}.kv_proj.weight" in weights:
        x = linear(weights, f"{pool}.kv_proj", x)
    x = layer_norm(weights, f"{pool}.ln_kv", x)
    places = weights[f"{pool}.pos_embed"]
    query = layer_norm(weights, f"{pool}.ln_q", weights[f"{pool}.query"])
    width, projection = visual["output_dim"], (f"{pool}.attn.in_proj_weight", f"{pool}.attn.in_proj_bias")
    result = (f"{pool}.attn.out_proj.weight", f"{pool}.attn.out_proj.bias")
    read = (query + places)[:, None], (x + grid_positions(places, len(x)))[:, None], x[:, None]
    out, _ = F.multi_head_attention_forward(
        *read, width, width // 128, *(weights[name] for name in projection), None, None, False, 0.0,
        *(weights[name] for name in result), training=False, need_weights=False,
    )  # fmt: skip
    return layer_norm(weights, f"{VISUAL}.ln_post", out[:, 0]) @ weights[f"{VISUAL}.proj"]


def embed(weights, config, ids, pixel_values):
    """Embeddings [T, E]; image tokens stand strictly between <img> and </img>, of which there may be more behind."""
    start = config["visual"]["image_start_id"]
    x = weights["transformer.wte.weight"][ids].clone()
    count = len(pixel_values)
    begins, ends = (torch.nonzero(ids == token).flatten().tolist()[:count] for token in (start, start + 1))
    for begin, end, pixels in zip(begins, ends, pixel_values, strict=True):
        x[begin + 1 : end] = image_tokens(weights, config, pixels)
    return x


def rotate(config, x):
    """x [T, H, D] turned to its positions: of the first channels, i turns together with i + half."""
    turning = int(config["kv_channels"] * config["rotary_pct"])
    frequency = config["rotary_emb_base"] ** -(torch.arange(0, turning, 2, dtype=torch.float64) / turning)
    angle = torch.outer(torch.arange(len(x), dtype=torch.float64), frequency)[:, None]
    first, second = x[..., : turning // 2], x[..., turning // 2 : turning]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), x[..., turning:]],
        dim=-1,
    )


def logits(weights, config, ids, pixel_values=()):
    """Logits [T, V] of one sample within the first `seq_length` tokens, as a NumPy array.

    Args:
        ids: [T] token ids, image slots included.
        pixel_values: [n, 3, height, width], the sample's images.
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    pixel_values = [torch.as_tensor(pixels).double() for pixels in pixel_values]
    x = embed(weights, config, ids, pixel_values)
    causal = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for index in range(config["num_hidden_layers"]):
        name = f"transformer.h.{index}"
        fused = linear(weights, f"{name}.attn.c_attn", rms_norm(config, weights, f"{name}.ln_1", x))
        heads = len(ids), config["num_attention_heads"], config["kv_channels"]
        q, k, v = (part.reshape(heads) for part in fused.chunk(3, dim=-1))
        q, k, v = (part.transpose(0, 1) for part in (rotate(config, q), rotate(config, k), v))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~causal, -torch.inf).softmax(-1)
        x = x + linear(weights, f"{name}.attn.c_proj", (scores @ v).transpose(0, 1).flatten(1))
        normed = rms_norm(config, weights, f"{name}.ln_2", x)
        gated = linear(weights, f"{name}.mlp.w1", normed) * F.silu(linear(weights, f"{name}.mlp.w2", normed))
        x = x + linear(weights, f"{name}.mlp.c_proj", gated)
    x = rms_norm(config, weights, "transformer.ln_f", x)
    head = weights.get("lm_head.weight", weights["transformer.wte.weight"])
    return (x @ head.T).numpy()
