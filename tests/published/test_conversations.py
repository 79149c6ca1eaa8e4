"""Processors that were really published: token ids, pixels, and what training learns, on every form of conversation."""

import json
import re
import shutil

import numpy as np
from tokenizers import processors as post

from lvlm_jax.processors import load
from lvlm_jax.training.data.pair_batches import Encoder
from lvlm_jax.training.data.pair_files import Conversation
from lvlm_jax.verification import conversations, peer
from lvlm_jax.verification.processors import differences
from lvlm_jax.weights import model_config
from tests.models.families.base import byte_tokenizer
from tests.published import folders

FORMS = conversations.forms()


def compared(folder):
    """Whether transformers reads the folder's processor and its tokenizer without the checkpoint's own code."""
    return (
        folders.configured(folder)
        and not peer.obstacle(folder)
        and (folder / "preprocessor_config.json").is_file()
        and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    )


def without_tokenizer(folder):
    """Whether all is there but the tokenizer."""
    return (
        folders.configured(folder)
        and not compared(folder)
        and any(folder.glob("chat_template.*"))
        and not peer.obstacle(folder)
    )


def read(folder):
    config = model_config(folder)
    return load.load_processor(folder, config), peer.processor(folder, config), config


def check(folder):
    """Ids and pixels, then what is learned of every conversation with an answer."""
    ours, theirs, config = read(folder)
    found = {name: differences(ours, theirs, config, chat) for name, chat in FORMS.items()}
    assert {name: said for name, said in found.items() if said} == {}
    refused = {name for name, said in found.items() if said is None}
    assert len(refused) < len(FORMS) / 2
    for name in ("several turns", "several turns about an image", "images in two turns"):
        check_learned(ours, theirs, config, FORMS[name])


def check_learned(ours, theirs, config, chat):
    """The mask leaves out prompts, which are those of transformers, and what it marks is the answers and their ends."""
    chat = [*chat, {"role": "assistant", "content": "Blue."}]
    images = [
        part["image"] for message in chat for part in message["content"] if isinstance(part, dict) and "image" in part
    ]
    bare = [
        message
        if isinstance(message["content"], str)
        else message | {"content": [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]}
        for message in chat
    ]
    row = Encoder(ours, config).conversation(Conversation(tuple(images), bare, "1"))
    tokens = next(iter(row.sequences.values())).tokens()
    starts = np.flatnonzero(tokens.answers & ~np.append(False, tokens.answers[:-1]))
    turns = [turn for turn, message in enumerate(chat) if message["role"] == "assistant"]
    assert len(starts) == len(turns)
    stops = {*config.eos_token_ids, ours.tokenizer.eos_token_id}
    for start, turn in zip(starts, turns, strict=True):
        end = start + np.argmin(np.append(tokens.answers[start:], False))
        learned = tokens.ids[start:end]
        said = chat[turn]["content"] if isinstance(chat[turn]["content"], str) else chat[turn]["content"][0]["text"]
        text = ours.tokenizer.decode(learned)
        assert text.strip().startswith(said)
        assert len(text.strip()) <= len(said) + 24  # the end of a turn, and no more
        if turn == turns[0]:
            prompt = theirs.arrays(chat[:turn])["input_ids"][0]
            np.testing.assert_array_equal(tokens.ids[:start], prompt)
    assert tokens.answers[-1] and tokens.ids[-1] in stops


@folders.of(compared)
def test_ids_pixels_and_learned_tokens(folder):
    check(folder)


@folders.of(without_tokenizer)
def test_a_published_template_over_a_small_tokenizer_that_adds_a_begin_token(folder, tmp_path):
    check(with_small_tokenizer(folder, tmp_path / "model"))


def with_small_tokenizer(folder, target):
    """A copy of a folder with a tokenizer of bytes, which knows the special tokens that its template writes."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*token*", "*.index.json", "*.model"))
    template = "".join(path.read_text() for path in sorted(target.glob("chat_template.*")))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    roles = {key: value for key, value in settings.items() if key in ("image_token", "boi_token", "eoi_token")}
    written = re.findall(r"<[\w|]+>|\[\w+\]", template)
    known = [entry["content"] for entry in settings["added_tokens_decoder"].values()]
    specials = [*dict.fromkeys([*roles.values(), *(token for token in known if token in written)])]
    config = json.loads((target / "config.json").read_text())
    roles.setdefault("image_token", "<|image|>")
    if roles["image_token"] not in specials:
        specials.append(roles["image_token"])
    tokenizer = byte_tokenizer(specials, **roles)
    tokenizer.backend_tokenizer.post_processor = post.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save_pretrained(target)
    (target / "tokenizer_config.json").write_text(
        json.dumps(
            json.loads((target / "tokenizer_config.json").read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        )
    )
    name = "image_token_id" if "image_token_id" in config else "image_token_index"
    config[name] = tokenizer.convert_tokens_to_ids(roles["image_token"])
    (target / "config.json").write_text(json.dumps(config))
    return target
