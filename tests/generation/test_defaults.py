"""The checkpoint's own settings: used as in transformers on request, ignored by default."""

import json
import shutil

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax import LVLM, methods
from lvlm_jax.cli import infer
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.defaults import of_checkpoint, with_defaults
from lvlm_jax.generation.settings import Decoding
from tests import checkpoints
from tests.checkpoints import IMAGE

PENALISED = {"do_sample": True, "repetition_penalty": 1.8, "temperature": 1e-6}  # nearly greedy, as Qwen2.5-VL


@pytest.fixture
def folder(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m")
    write(tmp_path / "m", PENALISED)
    return tmp_path / "m"


def write(folder, settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_as_transformers_generates(folder, torch_model):
    question = checkpoints.random_inputs(torch_model.config, seed=9, layouts=[(3, IMAGE, 5)])
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out = theirs.generate(**checkpoints.to_torch(question), max_new_tokens=12)
    want = out[0, question["input_ids"].shape[1] :].tolist()
    loaded = LVLM.from_pretrained(folder, generation_config="checkpoint")
    plain = LVLM.from_pretrained(folder)
    assert loaded.generate(question, max_new_tokens=12).tokens[0] == want
    assert plain.generate(question, max_new_tokens=12, generation_config="checkpoint").tokens[0] == want
    greedy = plain.generate(question, max_new_tokens=12).tokens[0]
    assert greedy != want
    assert loaded.generate(question, max_new_tokens=12, generation_config="plain").tokens[0] == greedy
    grid = [methods.VAF(start_layer=0, enhance=strength, suppress=1.0) for strength in (1.0, 8.0)]
    swept = [out.tokens for out in loaded.sweep(question, grid, max_new_tokens=12)]
    assert swept == [loaded.generate(question, method=one, max_new_tokens=12).tokens for one in grid]
    assert swept[0][0] == want


def test_what_a_file_says_and_what_a_call_gives(folder):
    decoding = with_defaults(Decoding(temperature=0.5, max_new_tokens=7), "checkpoint", folder)
    assert (decoding.temperature, decoding.repetition_penalty, decoding.max_new_tokens) == (0.5, 1.8, 7)
    assert decoding.top_k == 50  # what transformers samples from where the file says nothing
    assert with_defaults(Decoding(), "plain", folder) == Decoding()
    write(folder, {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": None})  # of sampling, which is off
    assert with_defaults(Decoding(), "checkpoint", folder) == Decoding()
    nothing = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beam_groups": 1, "use_cache": True}
    assert of_checkpoint(nothing | {"suppress_tokens": [], "early_stopping": False}, folder) == {}
    write(folder, {"stop_strings": ["###"]})
    assert with_defaults(Decoding(), "checkpoint", folder).stop == ("###",)
    assert with_defaults(Decoding(stop="end"), "checkpoint", folder).stop == ("end",)


def test_settings_that_cannot_be_honoured(folder, checkpoint):
    for given, message in (
        ({"do_sample": "yes"}, "do_sample is 'yes'"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'"),
        ({"repetition_penalty": [1]}, "repetition_penalty is"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size, which is not supported"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"num_beams": 2, "early_stopping": True}, "early_stopping"),
        ({"watermarking_config": {"bias": 2.5}}, "watermarking_config"),
        ({"stop_strings": [3]}, "stop is"),
    ):
        write(folder, given)
        with pytest.raises(LVLMError, match=message) as caught:
            with_defaults(Decoding(), "checkpoint", folder)
        assert "generation_config.json" in str(caught.value)
        assert with_defaults(Decoding(), "plain", folder) == Decoding()
    for end in ("</s>", [[2]], {"a": 1}, 2.5, [2, None]):
        write(folder, {"eos_token_id": end})
        with pytest.raises(LVLMError, match="generation_config.json: eos_token_id"):
            LVLM.from_pretrained(folder)
    with pytest.raises(LVLMError, match="generation_config is 'mine'; expected plain or checkpoint"):
        LVLM.from_pretrained(checkpoint, generation_config="mine")


def test_the_record_of_a_job_names_the_choice(folder, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "image": [], "text": "Hello"}) + "\n")
    words = ["--model-path", str(folder), "--question-file", str(questions), "--max-new-tokens", "30"]
    texts = {}
    for choice in ("plain", "checkpoint"):
        answers = tmp_path / f"{choice}.jsonl"
        code = infer.main([*words, "--answers-file", str(answers), "--generation-config", choice])
        record = json.loads(answers.with_name(f"{choice}.jsonl.run.json").read_text())
        assert code == 0 and record["generation"]["generation_config"] == choice
        texts[choice] = json.loads(answers.read_text())["text"]
    assert texts["plain"] != texts["checkpoint"]
