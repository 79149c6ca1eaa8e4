"""Small random InstructBLIP checkpoints in Hugging Face format, their processors, and padded inputs for them."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    BertTokenizer,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerFast,
)

from tests import small
from tests.checkpoints import randomize

QUERIES = 4
VOCABULARY = small.IMAGE_TOKEN_ID + 5  # rows behind the image token, as the hub's 32064 behind 32001
QFORMER_WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "what",
    "is",
    "this",
    "red",
    "the",
    "you",
    "are",
    "confused",
    "?",
)

# Name -> overrides of `config`. Together they cover what checkpoints differ by.
VARIETIES = {
    "vicuna": {},
    # The first layout on the hub: the vocabulary ends before the placeholder, which the configuration does not name.
    "published": {"text": {"vocab_size": small.IMAGE_TOKEN_ID}, "image_token_index": None},
    "gqa_no_qkv_bias_every_layer_looks": {
        "text": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        "vision": {"qkv_bias": False, "hidden_act": "quick_gelu", "image_size": 20, "patch_size": 5},
        "qformer": {"cross_attention_frequency": 1, "hidden_act": "relu", "num_attention_heads": 2},
        "num_query_tokens": 3,
    },
    "qwen2_tied_every_third_layer_looks": {
        "text": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision": {"layer_norm_eps": 1e-3, "hidden_act": "gelu_pytorch_tanh"},
        "qformer": {"cross_attention_frequency": 3, "num_hidden_layers": 4, "layer_norm_eps": 1e-3},
        "num_query_tokens": 1,
    },
}


def config(text=None, vision=None, qformer=None, **overrides) -> InstructBlipConfig:
    """A tiny InstructBlipConfig without an end-of-sequence token, so that greedy runs keep their full length."""
    text_fields = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **(text or {}),
    }
    vision_fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
        **(vision or {}),
    }
    qformer_fields = {
        "vocab_size": len(QFORMER_WORDS),
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        **(qformer or {}),
    }
    fields = {"num_query_tokens": QUERIES, "image_token_index": small.IMAGE_TOKEN_ID, **overrides}
    made = InstructBlipConfig(
        text_config=AutoConfig.for_model(**text_fields),
        vision_config=vision_fields,
        qformer_config=qformer_fields,
        **fields,
    )
    made._attn_implementation = "eager"
    return made


def make(folder: Path | None, seed: int, **overrides) -> InstructBlipForConditionalGeneration:
    """Saves a random checkpoint in `folder` and returns the torch model, in float32.

    The model in memory always has an `image_token_index`: transformers 5 cannot run without one.
    """
    made = config(**overrides)
    model = InstructBlipForConditionalGeneration(made).float().eval()
    randomize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    norm = model.language_model.model.norm.weight  # of either sign, see `randomize`
    norm.data *= torch.randn(norm.shape, generator=generator).sign()
    if folder is not None:
        model.save_pretrained(folder)
        if made.image_token_index is None:
            path = folder / "config.json"
            fields = json.loads(path.read_text())
            fields.pop("image_token_index", None)
            path.write_text(json.dumps(fields))
    return runnable(model)


def runnable(model: InstructBlipForConditionalGeneration) -> InstructBlipForConditionalGeneration:
    """The model with a placeholder, of whatever number inside the vocabulary."""
    if model.config.image_token_index is None:
        model.config.image_token_index = model.config.text_config.vocab_size - 1
    return model


def random_inputs(config: InstructBlipConfig, seed: int, samples) -> dict[str, np.ndarray]:
    """Left-padded arrays for transformers' model.

    Args:
        samples: (images, text tokens) of each sample; the images stand first.

    Returns:
        input_ids, attention_mask [B, T]; with images also pixel_values [I, 3, Y, X], qformer_input_ids and
        qformer_attention_mask [I, L], right-padded, the same for all images of a sample.
    """
    generator = np.random.default_rng(seed)
    rows, instructions = [], []
    for images, words in samples:
        placeholders = np.full(images * config.num_query_tokens, config.image_token_index)
        rows.append(np.concatenate([placeholders, generator.integers(3, small.IMAGE_TOKEN_ID - 1, words)]))
        length = int(generator.integers(3, 12))
        instructions += [generator.integers(4, config.qformer_config.vocab_size, length)] * images
    width = max(map(len, rows))
    inputs = {
        "input_ids": np.stack([np.pad(row, (width - len(row), 0)) for row in rows]).astype(np.int64),
        "attention_mask": np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64),
    }
    if instructions:
        longest, side = max(map(len, instructions)), config.vision_config.image_size
        padded = [np.pad(row, (0, longest - len(row))) for row in instructions]
        inputs["qformer_input_ids"] = np.stack(padded).astype(np.int64)
        inputs["qformer_attention_mask"] = np.stack(
            [np.arange(longest) < len(row) for row in instructions]
        ).astype(np.int64)
        inputs["pixel_values"] = generator.normal(size=(len(instructions), 3, side, side)).astype(np.float32)
    return inputs


def for_us(inputs: dict, theirs: InstructBlipConfig, ours) -> dict:
    """The same arrays with our placeholder, which may lie behind the vocabulary."""
    ids = inputs["input_ids"]
    return inputs | {"input_ids": np.where(ids == theirs.image_token_index, ours.image_token_id, ids)}


def write_processor(folder: Path, published: bool) -> InstructBlipProcessor:
    """Saves a processor in `folder` and returns that of transformers.

    Args:
        published: the first layout on the hub: no image token in the tokenizer, no `num_query_tokens`, single files
            for each part, and the name of the processor for videos.
    """
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text("\n".join(QFORMER_WORDS) + "\n")
    reader = BertTokenizer.from_pretrained(folder / "bert")
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})

    def tokenizer():
        bare = small.build_processor().tokenizer
        kept = json.loads(bare.backend_tokenizer.to_str())
        del kept["model"]["vocab"]["<image>"]
        kept["added_tokens"] = [token for token in kept["added_tokens"] if token["content"] != "<image>"]
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(kept)),
            pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        )  # fmt: skip

    if published:
        image_processor.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        reader.save_pretrained(folder / "qformer_tokenizer")
        name = {"processor_class": "InstructBlipVideoProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(name))
    whole = InstructBlipProcessor(image_processor, tokenizer(), reader, num_query_tokens=QUERIES)
    if not published:
        whole.save_pretrained(folder)
    return whole
