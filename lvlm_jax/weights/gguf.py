"""Reads GGUF, the file format of llama.cpp: configuration, tensors, tokenizer and chat template in one file.

The package `gguf` (ggml-org) dequantises one tensor at a time; tensors get the names of transformers. There are two
differences from a Hugging Face checkpoint. llama.cpp rotates neighbouring channels of a head and transformers rotates
halves, so rows of the query and key projections are in another order. And a tied output layer is left out.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from lvlm_jax.errors import LVLMError

SUFFIX = ".gguf"
_ROOT = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# How a byte-level vocabulary splits text before merging, by `tokenizer.ggml.pre` (llama.cpp's `llama-vocab.cpp`).
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")  # every digit is a separate token
_PLAIN = ("default", "gpt-2")
_CONTROL, _USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


class GgufFile:
    """An open GGUF file, with the interface of `SafetensorsFile`; tensors are float32 whatever their stored type.

    Attributes:
        shapes: tensor name in transformers -> shape.
        dtypes: tensor name -> NumPy dtype, float32.

    Raises:
        LVLMError: the package `gguf` is not installed, or the file is missing or damaged, or its model is not a LLaMA.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            import gguf
        except ImportError as error:
            raise LVLMError(
                f"{self.path} is read with the package gguf, which is not installed: pip install 'gguf>=0.19,<0.20'"
            ) from error
        if not self.path.is_file():
            raise LVLMError(f"cannot read {self.path}: it is not a file")
        try:
            self._reader = gguf.GGUFReader(self.path)
            self._tensors = {_name(tensor.name): tensor for tensor in self._reader.tensors}
        except LVLMError:
            raise
        except Exception as error:  # the reader raises whatever the first bad offset causes
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise LVLMError(f"cannot read {self.path} as GGUF: {reason}") from error
        if self.field("general.architecture") != "llama":
            architecture = self.field("general.architecture")
            raise LVLMError(f"{self.path} has a model of the architecture {architecture!r}; expected 'llama'")
        if "rope_freqs.weight" in self._tensors or self.field("llama.rope.scaling.type", "none") != "none":
            raise LVLMError(f"{self.path} scales its rotary positions, which is not supported in GGUF")
        # In the file, axes are ordered from the innermost to the outermost.
        self.shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in self._tensors.items()}
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def field(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata."""
        entry = self._reader.get_field(key)
        return default if entry is None else entry.contents()

    def view(self, name: str) -> np.ndarray:
        """The tensor with its rows in transformers' order."""
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(self.shapes[name])
        except (ValueError, NotImplementedError, IndexError, TypeError) as error:
            raise LVLMError(f"{self.path}: tensor {name} cannot be dequantised: {error}") from error
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.field("llama.attention.head_count")
            num_heads = heads if name.endswith("q_proj.weight") else self.field("llama.attention.head_count_kv", heads)
            values = to_halves(values, int(num_heads))
        return values

    def release(self, name: str) -> None:
        """Does nothing, because no tensor is kept."""

    def hf_config(self) -> dict[str, Any]:
        """The `config.json` of a `LlamaForCausalLM` for this file."""
        heads = self.field("llama.attention.head_count")
        sizes = {
            "vocab_size": self.shapes.get("model.embed_tokens.weight", (None,))[0],
            "hidden_size": self.field("llama.embedding_length"),
            "intermediate_size": self.field("llama.feed_forward_length"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_attention_heads": heads,
            "max_position_embeddings": self.field("llama.context_length"),
            "rms_norm_eps": self.field("llama.attention.layer_norm_rms_epsilon"),
        }
        if missing := [name for name, value in sizes.items() if value is None]:
            raise LVLMError(f"{self.path} lacks its {missing[0]}; expected the metadata of a LLaMA")
        # llama.cpp stores a float32; 1e-5 comes back as 9.999999747378752e-06.
        sizes["rms_norm_eps"] = float(f"{sizes['rms_norm_eps']:.6g}")
        tokens = {
            name: self.field(f"tokenizer.ggml.{key}_token_id")
            for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        }
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            **sizes,
            "num_key_value_heads": self.field("llama.attention.head_count_kv", heads),
            "head_dim": self.field("llama.attention.key_length", sizes["hidden_size"] // heads),
            "rope_theta": float(self.field("llama.rope.freq_base", 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in self.shapes,
            **{name: token for name, token in tokens.items() if token is not None},
        }

    def write_tokenizer(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, with the chat template if the file has one.

        Raises:
            LVLMError: the vocabulary is not byte-level BPE, or its text splitting is unknown.
        """
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        kind, pre = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "default")
        if kind != "gpt2" or pre not in (*_DIGITS, *_PLAIN):
            raise LVLMError(
                f"the tokenizer of {self.path} ({kind}, {pre}) is not supported; expected gpt2 with one of "
                f"{', '.join((*_DIGITS, *_PLAIN))}"
            )
        words = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges", [])]
        tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
        split = pre_tokenizers.ByteLevel(add_prefix_space=False)
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, split]) if pre in _DIGITS else split
        tokenizer.decoder = decoders.ByteLevel()
        types = self.field("tokenizer.ggml.token_type", [])
        special = [word for word, type_ in zip(words, types, strict=False) if type_ == _CONTROL]
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
        defined = [word for word, type_ in zip(words, types, strict=False) if type_ == _USER_DEFINED]
        tokenizer.add_tokens([AddedToken(word, normalized=False) for word in defined])
        tokenizer.save(str(folder / "tokenizer.json"))
        roles = (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown"))
        special_ids = {name: self.field(f"tokenizer.ggml.{key}_token_id") for name, key in roles}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.field("llama.context_length"),
            "padding_side": "left",
            **{name: words[token] for name, token in special_ids.items() if token is not None},
        }
        if template := self.field("tokenizer.chat_template"):
            settings["chat_template"] = template
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from [heads, pairs, 2] to transformers' [heads, 2, pairs]."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _name(stored: str) -> str:
    """transformers' name of a tensor; unknown names are returned unchanged, and reported later."""
    if stored in _ROOT:
        return _ROOT[stored]
    part, _, rest = stored.partition(".")
    number, _, name = rest.partition(".")
    kind, _, suffix = name.partition(".")
    if part == "blk" and kind in _BLOCK:
        return f"model.layers.{number}.{_BLOCK[kind]}.{suffix}"
    return stored
