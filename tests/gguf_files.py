"""Small GGUF files, made with ggml's own package."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints import randomize

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["<|end|>", "<|user|>", *LETTERS, "Ġa", "at"]
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=128, rope_theta=5e4, rms_norm_eps=1e-5)
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj"}
NAMES |= {"attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
NAMES |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def write(
    path: Path,
    tied: bool,
    kind: str = "Q8_0",
    architecture: str = "llama",
    pre: str = "smollm",
    words: Sequence[str] = WORDS,
    special: int = 2,
    eos: int = 0,
) -> Path:
    """A random LLaMA as llama.cpp's converter writes it; matrices are stored as `kind`.

    Args:
        words: the vocabulary, of which the first `special` are special.
        eos: the token that ends an answer.
    """
    import gguf

    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(words), tie_word_embeddings=tied))
    randomize(model, 3)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3] * special + [1] * (len(words) - special))
    writer.add_token_merges(["Ġ a", "a t"] if "at" in words else [])
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, array: np.ndarray) -> None:
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)

    add("token_embd.weight", state["model.embed_tokens.weight"])
    add("output_norm.weight", state["model.norm.weight"])
    if not tied:
        add("output.weight", state["lm_head.weight"])
    for layer in range(2):
        for ours, theirs in NAMES.items():
            array = state[f"model.layers.{layer}.{theirs}.weight"]
            if heads := {"attn_q": 4, "attn_k": 2}.get(ours):  # `permute` of llama.cpp's convert_hf_to_gguf.py
                array = array.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(array.shape)
            add(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
