"""LLaVA in plain NumPy float64: one sample at a time, no batching, no padding.

Every function takes `weights`, the state dict of a transformers `LlavaForConditionalGeneration` as float64
arrays under the names it has in memory (`model.language_model.layers.0.self_attn.q_proj.weight`, ...), and
`config`, the plain dictionary `model.config.to_dict()`. Linear weights are therefore stored [out, in].

Letters: T rows, S columns, H query heads, K key/value heads, D head dim, N tokens of one image, V vocabulary.
"""

import math

import numpy as np

LANGUAGE = "model.language_model"
TOWER = "model.vision_tower"
CONNECTOR = "model.multi_modal_projector"


def from_torch(model):
    """(weights, config) of a transformers model, in the form the functions of this file take."""
    weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    return weights, model.config.to_dict()


def linear(weights, name, x):
    """x [..., in] through the linear layer `name`, with its bias if it has one."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(weights, name, x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights, name, x, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weights[f"{name}.weight"]


def softmax(z):
    """Softmax over the last axis; entries of −inf get weight 0."""
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def split_heads(x, count):
    """[T, count·D] -> [count, T, D]."""
    return x.reshape(x.shape[0], count, -1).transpose(1, 0, 2)


def merge_heads(x):
    """[H, T, D] -> [T, H·D]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def tower_hidden_states(weights, config, pixels, edit=lambda layer, w: w, fed=lambda layer, added: added):
    """Hidden states of the CLIP tower for one image `pixels` [3, height, width].

    `edit` may replace weights [H, T, S], and `fed` what a feed-forward block adds to the stream, [T, W].

    Returns a list of num_layers + 1 arrays [1 + patches, W]: the embeddings after the first norm, then the
    output of every layer. The norm after the last layer belongs to pooling and is not part of any of them.
    """
    vision = config["vision_config"]
    patch, heads, epsilon = vision["patch_size"], vision["num_attention_heads"], vision["layer_norm_eps"]
    grid = vision["image_size"] // patch
    kernel = weights[f"{TOWER}.embeddings.patch_embedding.weight"]  # [W, 3, patch, patch]
    tokens = [weights[f"{TOWER}.embeddings.class_embedding"]]
    for i in range(grid):
        for j in range(grid):
            square = pixels[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(np.einsum("WCIJ,CIJ->W", kernel, square))
    x = np.stack(tokens) + weights[f"{TOWER}.embeddings.position_embedding.weight"]
    x = layer_norm(weights, f"{TOWER}.pre_layrnorm", x, epsilon)
    states = [x]
    for layer in range(vision["num_hidden_layers"]):
        name = f"{TOWER}.encoder.layers.{layer}"
        y = layer_norm(weights, f"{name}.layer_norm1", x, epsilon)
        q, k, v = (split_heads(linear(weights, f"{name}.self_attn.{p}_proj", y), heads) for p in "qkv")
        w = edit(layer, softmax(np.einsum("HTD,HSD->HTS", q, k) / math.sqrt(q.shape[-1])))
        x = x + linear(weights, f"{name}.self_attn.out_proj", merge_heads(np.einsum("HTS,HSD->HTD", w, v)))
        y = linear(weights, f"{name}.mlp.fc1", layer_norm(weights, f"{name}.layer_norm2", x, epsilon))
        x = x + fed(layer, linear(weights, f"{name}.mlp.fc2", ACTIVATIONS[vision["hidden_act"]](y)))
        states.append(x)
    return states


def image_features(weights, config, pixels, *edit):
    """Features [N, E] of one image as they enter the language model."""
    states = tower_hidden_states(weights, config, pixels, *edit)
    layers = config["vision_feature_layer"]
    layers = [layers] if isinstance(layers, int) else layers
    x = np.concatenate([states[layer] for layer in layers], axis=-1)
    if config["vision_feature_select_strategy"] == "default":
        x = x[1:]
    x = linear(weights, f"{CONNECTOR}.linear_1", x)
    return linear(weights, f"{CONNECTOR}.linear_2", ACTIVATIONS[config["projector_hidden_act"]](x))


def embed(weights, config, input_ids, pixel_values, *edit):
    """Embeddings [T, E] of one sample, image tokens replaced by the features of `pixel_values` [n, 3, h, w].

    `edit` are those of `tower_hidden_states`, if any.
    """
    x = weights[f"{LANGUAGE}.embed_tokens.weight"][input_ids]
    is_image = np.asarray(input_ids) == config["image_token_index"]
    if is_image.any():
        x[is_image] = np.concatenate([image_features(weights, config, pixels, *edit) for pixels in pixel_values])
    return x


def inverse_frequencies(text):
    """(frequencies [D/2], factor on cos and sin) of the rotary kind in `text["rope_parameters"]`.

    Kinds: default; linear (position interpolation); llama3 (long waves divided by the factor, short ones
    kept, between them a linear mix); yarn (arXiv 2309.00071: the mix is linear in the channel index).
    """
    rope = text["rope_parameters"]
    kind, theta = rope["rope_type"], rope["rope_theta"]
    dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if kind == "default":
        return plain, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return plain / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * plain / (2 * math.pi)  # full turns within the original context
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * plain + (1 - keep) * plain / factor, 1.0
    if kind == "yarn":
        fast, slow = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1

        def channel(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = max(math.floor(channel(fast)), 0), min(math.ceil(channel(slow)), dim - 1)
        divide = np.clip((np.arange(dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        given = rope.get("attention_factor")
        scale = given if given is not None else 0.1 * math.log(factor) + 1.0
        return (1 - divide) * plain + divide * plain / factor, scale
    raise ValueError(f"no reference for the rotary kind {kind!r}")


def rotate(text, x, positions):
    """x [heads, T, D] turned to real `positions` [T]; channel d turns together with channel d + D/2.

    Multimodal positions are [3, T]: the first planes follow the first axis, the next the second, the last the third,
    so many of each as `mrope_section` says.
    """
    frequencies, scale = inverse_frequencies(text)
    positions = np.atleast_2d(np.asarray(positions, np.float64))
    sections = text["rope_parameters"].get("mrope_section") if len(positions) > 1 else [len(frequencies)]
    angle = np.repeat(positions, sections, axis=0).T * frequencies
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def project(weights, config, layer, hidden):
    """Queries [H, T, D], keys [K, T, D] and values [K, T, D] of `hidden` [T, E], before any rotation."""
    text = config["text_config"]
    name = f"{LANGUAGE}.layers.{layer}"
    x = rms_norm(weights, f"{name}.input_layernorm", hidden, text["rms_norm_eps"])
    counts = {"q": text["num_attention_heads"], "k": text["num_key_value_heads"], "v": text["num_key_value_heads"]}
    q, k, v = (split_heads(linear(weights, f"{name}.self_attn.{p}_proj", x), counts[p]) for p in "qkv")
    if f"{name}.self_attn.q_norm.weight" in weights:
        q = rms_norm(weights, f"{name}.self_attn.q_norm", q, text["rms_norm_eps"])
        k = rms_norm(weights, f"{name}.self_attn.k_norm", k, text["rms_norm_eps"])
    return q, k, v


def visible(config, layer, rows, columns):
    """Bool[T, S]: may the row at position rows[t] see the column at position columns[s] in this layer?"""
    text = config["text_config"]
    allowed = columns[None, :] <= rows[:, None]
    window = text.get("sliding_window") if text["model_type"] != "llama" else None
    kinds = text.get("layer_types")  # absent for families whose layers are all alike
    if window is not None and (kinds is None or kinds[layer] == "sliding_attention"):
        allowed &= columns[None, :] > rows[:, None] - window
    return allowed


def scores(text, q, k, row_positions, column_positions):
    """Attention logits [H, T, S] = RoPE(q, row) · RoPE(k, column) / sqrt(D), key heads repeated."""
    q = rotate(text, q, row_positions)
    k = np.repeat(rotate(text, k, column_positions), q.shape[0] // k.shape[0], axis=0)
    return np.einsum("HTD,HSD->HTS", q, k) / math.sqrt(q.shape[-1])


def finish_layer(weights, config, layer, hidden, attended, edit=lambda x, added: added):
    """The layer after its attention: `attended` [H, T, D], residual stream `hidden` [T, E] -> [T, E].

    `edit(x, added)` replaces what the feed-forward block, which reads x, adds to the stream; all [T, E].
    """
    text = config["text_config"]
    name = f"{LANGUAGE}.layers.{layer}"
    hidden = hidden + linear(weights, f"{name}.self_attn.o_proj", merge_heads(attended))
    x = rms_norm(weights, f"{name}.post_attention_layernorm", hidden, text["rms_norm_eps"])
    return hidden + edit(x, feed_forward(weights, config, layer, x))


def feed_forward(weights, config, layer, x):
    """What a layer's feed-forward block makes of x [T, E]."""
    name, text = f"{LANGUAGE}.layers.{layer}.mlp", config["text_config"]
    gate = ACTIVATIONS[text["hidden_act"]](linear(weights, f"{name}.gate_proj", x))
    return linear(weights, f"{name}.down_proj", gate * linear(weights, f"{name}.up_proj", x))


def head(weights, config, hidden):
    """Next-token logits [T, V] of the last layer's output [T, E]."""
    x = rms_norm(weights, f"{LANGUAGE}.norm", hidden, config["text_config"]["rms_norm_eps"])
    table = weights.get("lm_head.weight", weights[f"{LANGUAGE}.embed_tokens.weight"])
    return x @ table.T


def logits(weights, config, input_ids, pixel_values=None):
    """Logits [T, V] of one sample in one plain pass."""
    text = config["text_config"]
    hidden = embed(weights, config, input_ids, pixel_values)
    positions = np.arange(len(input_ids))
    for layer in range(text["num_hidden_layers"]):
        q, k, v = project(weights, config, layer, hidden)
        z = np.where(visible(config, layer, positions, positions), scores(text, q, k, positions, positions), -np.inf)
        v = np.repeat(v, q.shape[0] // v.shape[0], axis=0)
        hidden = finish_layer(weights, config, layer, hidden, np.einsum("HTS,HSD->HTD", softmax(z), v))
    return head(weights, config, hidden)
