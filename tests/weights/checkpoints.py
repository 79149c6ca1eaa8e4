"""Small random checkpoints in the layouts found in the wild. Names are written out here, not taken from the tables."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig
from transformers import LlavaForConditionalGeneration as Llava

from lvlm_jax import models, weights
from lvlm_jax.weights import lora
from lvlm_jax.weights.tables import flatten, unflatten

VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
VISION |= dict(image_size=28, patch_size=14, projection_dim=16)
TEXT = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, vocab_size=96)


def random_model(seed=0, tie=False, **text) -> Llava:
    """A transformers model with random weights in every tensor, biases and norms included."""
    torch.manual_seed(seed)
    text = LlamaConfig(**{**TEXT, **text}, tie_word_embeddings=tie)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=90, tie_word_embeddings=tie
    )
    model = Llava(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    return model


def tensors(model, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(dtype).clone().contiguous() for name, tensor in model.state_dict().items()}


def renamed(state: dict, *pairs: tuple[str, str]) -> dict:
    """The state dict with the first matching prefix of every name replaced."""

    def rename(name):
        return next((new + name[len(old) :] for old, new in pairs if name.startswith(old)), name)

    return {rename(name): tensor for name, tensor in state.items()}


def hub_tensors(model, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """The tensors under the names of published checkpoints."""
    return renamed(tensors(model, dtype), *HUB)


HUB = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
STATE_DICT_4 = (("model.vision_tower.", "model.vision_tower.vision_model."),)
ORIGINAL = (
    ("model.language_model.", "model."),
    ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
)


def write_config(folder, config: dict):
    """The folder, with that `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write(folder, config: dict, state: dict):
    save_file(state, write_config(folder, config) / "model.safetensors", metadata={"format": "pt"})
    return folder


def config_of(folder):
    """Our configuration of a checkpoint folder."""
    return models.config_from_hf(weights.read_config(folder))


def load(folder, *arguments, **options):
    """Its parameters."""
    return weights.load_parameters(folder, config_of(folder), *arguments, **options)


def change_config(folder, change: dict, name: str = "config.json") -> None:
    """Changes entries of the `config.json` of a folder."""
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))


def adapted(params, targets=lora.TARGETS, rank=3, alpha=7.0, dropout=0.0, key=0, rslora=False):
    """(adapters, frozen) of `params`, with a B that is not zero."""
    adapters, frozen = lora.attach_adapters(params, rank, alpha, targets, dropout, jax.random.key(key), rslora)
    rng, flat = np.random.default_rng(key), flatten(adapters)
    drawn = {path: rng.normal(0, 0.05, leaf.shape) for path, leaf in flat.items() if path.endswith("_b")}
    return unflatten(flat | {path: jnp.asarray(leaf, jnp.float32) for path, leaf in drawn.items()}), frozen


def write_scheme(folder, model, pairs=(), dtype=torch.float32):
    return write(folder, model.config.to_dict(), renamed(tensors(model, dtype), *pairs))


def write_sharded(folder, config: dict, state: dict, count: int):
    write_config(folder, config)
    names, weight_map = sorted(state), {}
    for number in range(count):
        file, part = f"model-{number + 1:05}-of-{count:05}.safetensors", names[number::count]
        save_file({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def original_config(tower: str, vocabulary: int) -> dict:
    """`config.json` of a liuhaotian checkpoint, with small sizes."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    return {name: TEXT[name] for name in names} | {
        "_name_or_path": "llava-v1.5-small", "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": vocabulary, "hidden_act": "silu",
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "image_aspect_ratio": "pad",
        "initializer_range": 0.02, "max_length": 4096, "max_position_embeddings": 2048, "pretraining_tp": 1,
        "mm_hidden_size": VISION["hidden_size"], "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": tower, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False, "use_cache": True,
    }  # fmt: skip


def split_tower(state: dict) -> tuple[dict, dict]:
    """(language model and projector under the original names, tower under CLIP's)."""
    inside = "model.vision_tower."
    tower = {f"vision_model.{k.removeprefix(inside)}": v for k, v in state.items() if k.startswith(inside)}
    rest = renamed({k: v for k, v in state.items() if not k.startswith(inside)}, *ORIGINAL)
    return rest, tower


def clip_model(tower: dict, whole: bool):
    """A CLIPModel or CLIPVisionModel of transformers that holds the tower."""
    if not whole:
        clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
        clip.load_state_dict({name.removeprefix("vision_model."): value for name, value in tower.items()})
        return clip
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16))
    clip.load_state_dict(tower, strict=False)
    return clip


def stored_dtypes(folder) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}


def assert_same(a: dict, b: dict) -> None:
    """Two parameter trees are bit-equal."""
    first, second = flatten(a), flatten(b)
    assert first.keys() == second.keys()
    for path in first:
        assert first[path].dtype == second[path].dtype, path
        np.testing.assert_array_equal(np.asarray(first[path]), np.asarray(second[path]), err_msg=path)


def expected_parameters(model) -> dict[str, np.ndarray]:
    """{parameter path: array} of a torch model, by string rules of its own rather than the tables."""
    flat = {}
    for name, tensor in model.state_dict().items():
        array = tensor.detach().numpy()
        path = name.removeprefix("model.").replace("multi_modal_projector", "connector")
        path = path.replace("encoder.", "").replace("embeddings.", "").replace("pre_layrnorm", "pre_layernorm")
        path = path.replace("lm_head", "language_model.lm_head").replace("layers.", "layers_").replace(".", "/")
        if "norm" in path:
            path = path.replace("/weight", "/scale")
        elif "embed_tokens" in path or "position_embedding" in path:
            path = path.replace("/weight", "/embedding")
        elif path.endswith("/weight"):
            path = path.replace("/weight", "/kernel")
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        flat[path] = array
    return flat
