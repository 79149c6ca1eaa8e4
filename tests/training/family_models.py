"""Tiny random models of all families with processors beside them, for tests of training."""

from lvlm_jax import LVLM
from tests.models import (
    instructblip_checkpoints,
    qwen2_checkpoints,
    qwen_vl_checkpoints,
    test_gemma3_parity,
    test_glm4v_parity,
    test_internvl_parity,
    test_llava_next_parity,
    test_llava_onevision_parity,
    test_qwen3_vl_parity,
    test_smolvlm_parity,
)
from tests.processors import test_qwen_vl as qwen_vl


def _qwen(make, processor_class):
    """A maker for a family with Qwen's image tokens."""

    def made(folder):
        tokenizer = qwen2_checkpoints.write_processor(folder, processor_class)
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        tokens = tokenizer.convert_tokens_to_ids(list(qwen2_checkpoints.SPECIALS))
        make(folder, text={"vocab_size": len(tokenizer)}, **dict(zip(names, tokens, strict=True)))
        return LVLM.from_pretrained(folder)

    return made


def _qwen2(model_type):
    return lambda folder, **changes: qwen2_checkpoints.make(folder, model_type, 3, **changes)


def _glm4v(folder):
    tokenizer = test_glm4v_parity.write_processor(folder)
    names = {"image_token_id": "<|image|>", "video_start_token_id": "<|begin_of_video|>"}
    names |= {"image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>"}
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return test_glm4v_parity.make(folder, text={"vocab_size": len(tokenizer)}, **tokens)[1]


def _qwen_vl(folder):
    qwen_vl_checkpoints.make(folder, qwen_vl.CONFIG, seed=4)
    qwen_vl.write_files(folder)
    return LVLM.from_pretrained(folder)


def _instructblip(folder):
    instructblip_checkpoints.make(folder, 3)
    instructblip_checkpoints.write_processor(folder, published=False)
    return LVLM.from_pretrained(folder)


# Family -> maker of its model, in a folder.
MAKERS = {
    "gemma3": test_gemma3_parity.with_processor,
    "glm4v": _glm4v,
    "idefics3": lambda folder: test_smolvlm_parity.with_processor("idefics3", folder),
    "instructblip": _instructblip,
    "internvl": test_internvl_parity.with_processor,
    "llava_next": lambda folder: test_llava_next_parity.load(folder, "vicuna")[1],
    "llava_onevision": lambda folder: test_llava_onevision_parity.load(folder, "seven_billion")[1],
    "qwen2_5_vl": _qwen(_qwen2("qwen2_5_vl"), "Qwen2_5_VLProcessor"),
    "qwen2_vl": _qwen(_qwen2("qwen2_vl"), "Qwen2VLProcessor"),
    "qwen3_vl": _qwen(test_qwen3_vl_parity.make, "Qwen3VLProcessor"),
    "qwen_vl": _qwen_vl,
    "smolvlm": lambda folder: test_smolvlm_parity.with_processor("smolvlm", folder),
}
