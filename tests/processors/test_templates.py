"""Chat templates get the form of message that they were written for, and what they refuse is one line."""

import copy
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.processors import inputs, load, rendering, templates
from lvlm_jax.training.data.pair_batches import Encoder
from lvlm_jax.training.data.pair_files import Conversation, assistant
from lvlm_jax.weights import model_config, names

# As the published one of GLM-4.1V: lists in the user's turns alone.
USERS_LISTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' and m.content is not string %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<image>' }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
STRINGS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LISTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}<image>{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As the published one of LLaVA-OneVision: an answered turn has another blank behind the role.
OTHER_BLANKS = (
    "{% for m in messages %}{{ '|' + m['role'] + ' ' }}{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else '\n' + p['text'] }}{% endfor %}{{ '|end|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '|assistant\n' }}{% endif %}"
)
REFUSES = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}x"


@pytest.fixture(scope="module")
def config():
    return model_config(Path(names.checkpoint("pocket")))


@pytest.fixture(scope="module")
def pocket(config):
    return load.load_processor(Path(names.checkpoint("pocket")), config)


@pytest.fixture
def with_template(pocket):
    def make(template: str):
        processor = copy.copy(pocket)
        processor.chat_template = template
        return processor

    return make


def text_of(words: str) -> list[dict]:
    return [{"type": "text", "text": words}]


def prompt_of(processor, config, messages) -> np.ndarray:
    """Token ids of a prompt, without padding and images."""
    laid_out = inputs.from_messages(processor, config, messages)
    return laid_out.tokens[0][laid_out.image_id[0] == 0]


def learned(processor, config, messages) -> tuple[np.ndarray, str]:
    """Token ids of a training row, and the text that is learned."""
    row = Encoder(processor, config).conversation(Conversation((), messages, "1"))
    tokens = next(iter(row.sequences.values())).tokens()
    return tokens.ids, processor.tokenizer.decode(tokens.ids[tokens.answers])


@pytest.mark.parametrize("template", [USERS_LISTS, STRINGS, LISTS])
@pytest.mark.parametrize("form", [str, text_of])
def test_strings_and_lists_reach_every_template_as_the_text_they_hold(template, form, with_template, config):
    processor = with_template(template)
    said = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", "What?")]
    messages = [{"role": role, "content": form(text)} for role, text in said]
    got = processor.tokenizer.decode(prompt_of(processor, config, messages), skip_special_tokens=True)
    want = "system: Be brief.\nuser: Hello\nassistant: Hi\nuser: What?\nassistant: "
    assert got == want
    _, answers = learned(processor, config, [*messages, {"role": "assistant", "content": form("A cat.")}])
    assert answers.replace(" ", "") in ("HiAcat.</s>", "Hi\nAcat.</s>")
    continued = [*messages, {"role": "assistant", "content": form("A")}]
    text = templates.render(processor, templates.in_template_form(processor, continued), False, continued=True)
    assert text == want + "A"


def test_a_template_that_reads_both_forms_gets_what_was_given(with_template):
    both = (
        "{% for m in messages %}{{ 's' if m.content is string else 'l' }}"
        "{{ m.content if m.content is string else m.content[0].text }}{% endfor %}"
    )
    processor = with_template(both)
    messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": text_of("B") + text_of("C")}]
    assert templates.in_template_form(processor, messages) == messages
    assert templates.render(processor, messages, False) == "sAlB"


def test_images_stay_lists_beside_strings(with_template, config):
    processor = with_template(USERS_LISTS)
    picture = {"type": "image", "image": Image.new("RGB", (96, 96))}
    messages = [
        {"role": "system", "content": text_of("Be brief.")},
        {"role": "user", "content": [picture, *text_of("What?")]},
    ]
    laid_out = inputs.from_messages(processor, config, messages)
    assert (laid_out.image_id == 1).sum() == config.tokens_per_image
    with pytest.raises(LVLMError, match="0 image placeholders|cannot write the conversation"):
        inputs.from_messages(with_template(STRINGS), config, messages)


def test_what_a_template_raises_is_one_line(with_template, config):
    """The error names the sample or the row."""
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": text_of("b")}]
    for template, said in (
        (REFUSES, "refuses the conversation: roles must alternate"),
        ("{% for m in %}", "broken at line 1"),
        ("{{ ''.__class__.__mro__ }}", "cannot write the conversation .SecurityError"),
        ("{{ 1 / 0 }}", "cannot write the conversation .ZeroDivisionError"),
    ):
        processor = with_template(template)
        with pytest.raises(LVLMError, match=said) as caught:
            inputs.from_messages(processor, config, messages)
        assert "\n" not in str(caught.value)
        with pytest.raises(LVLMError, match=f"row 7.*{said}"):
            Encoder(processor, config).conversation(Conversation((), [*messages, assistant("c")], "7"))
    with pytest.raises(LVLMError, match="^sample 1: the chat template refuses"):
        inputs.from_messages(with_template(REFUSES), config, [messages[:1], messages])


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end within 2 sec"),
        ("{{ 9 ** (9 ** 9) }}", "does not end within 2 seconds"),  # never comes back to Python
        ("{{ 'x' * 10 ** 9 }}", "needs more than 256 MB"),
        ("{% for a in range(9999) %}{{ '%9999d' % a }}{% endfor %}", "writes more than 2,000,000 characters"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "cannot write the conversation .RecursionError"),
    ],
)
def test_a_template_without_end_is_one_line(template, said, with_template):
    with pytest.raises(LVLMError, match=said) as caught:
        templates.in_template_form(with_template(template), [{"role": "user", "content": "a"}])
        templates.render(with_template(template), [{"role": "user", "content": "a"}], True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize("prompt, continued", [(True, False), (False, False), (False, True)])
def test_texts_are_those_of_transformers(pocket, prompt, continued):
    messages = [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": [{"type": "image"}, *text_of("Was ist \u2028 \U0001f600 \\ \x00?")], "x": 1.5},
        {"role": "assistant", "content": text_of(" A ")},
    ]
    options = {"add_generation_prompt": prompt, "continue_final_message": continued}
    want = pocket.apply_chat_template(messages, tokenize=False, **options)
    assert templates.render(pocket, messages, prompt, continued) == want


def test_a_process_that_ended_is_replaced_and_a_forked_process_has_one_of_its_own(pocket):
    asked = (pocket, [{"role": "user", "content": text_of("Hello")}], True)
    want = templates.render(*asked)
    rendering.RENDERER._process.kill()
    rendering.RENDERER._process.wait()
    assert templates.render(*asked) == want
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.starmap(templates.render, [asked] * 2) == [templates.render(*asked)] * 2


def test_a_begin_token_that_the_template_writes_is_the_only_one(pocket, with_template, config):
    messages = [{"role": "user", "content": text_of("Hello")}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "np"}
    for processor in (pocket, with_template("{{ bos_token }}" + pocket.chat_template)):
        want = processor.apply_chat_template(messages, **options)["input_ids"][0].tolist()
        ids, _ = learned(processor, config, [*messages, assistant("Hi")])
        assert prompt_of(processor, config, messages).tolist() == want == ids[: len(want)].tolist()
        assert want.count(processor.tokenizer.bos_token_id) == 1
    side = config.vision.image_size  # and pictures that are encoded ahead get no second one either
    tokens = np.zeros((config.tokens_per_image, config.text.hidden_size), np.float32)
    encoded = inputs.EncodedImage(np.zeros((3, side, side), np.float32), tokens)
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": one}, *text_of("Hi")]}]
        for one in (encoded, Image.new("RGB", (side, side)))
    ]
    np.testing.assert_array_equal(*(inputs.from_messages(processor, config, one).tokens for one in conversations))


def test_a_template_that_writes_other_blanks_behind_an_answered_prompt_can_be_trained(with_template, config):
    processor = with_template(OTHER_BLANKS)
    user = {"role": "user", "content": text_of("Hello")}
    prompt = prompt_of(processor, config, [user])
    ids, answer = learned(processor, config, [user, assistant("Hi")])
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert answer == "Hi|end|</s>"
    ids, answers = learned(processor, config, [user, assistant("Hi"), user, assistant("Yes")])
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert answers == "Hi|end|Yes|end|</s>"
    other = with_template(OTHER_BLANKS.replace("|assistant\n", "|assistant:\n"))
    with pytest.raises(LVLMError, match="row 1.*writes a prompt differently once it is answered"):
        learned(other, config, [user, assistant("Hi")])


def test_what_a_processor_raises_is_one_line_that_names_the_sample(pocket, config):
    class Narrow:
        """A processor that cannot take very long pictures, as Qwen2-VL's."""

        def __getattr__(self, name):
            return getattr(pocket, name)

        def __call__(self, images=None, **options):
            if images and images[0].width > 200 * images[0].height:
                raise ValueError("absolute aspect ratio must be smaller than 200,\ngot 400.0")
            return pocket(images=images, **options)

    def asked(width):
        picture = {"type": "image", "image": Image.new("RGB", (width, 1))}
        return [{"role": "user", "content": [picture, *text_of("What?")]}]

    inputs.from_messages(Narrow(), config, [asked(40), asked(150)])
    with pytest.raises(LVLMError, match="^sample 1: .*400 x 1 pixels: absolute aspect ratio .*, got 400.0$"):
        inputs.from_messages(Narrow(), config, [asked(40), asked(400)])


def test_what_no_tokenizer_or_embedding_holds_is_refused(pocket, config):
    with pytest.raises(LVLMError, match=r"contains '.+ud83d', which is half of a character") as caught:
        inputs.from_messages(pocket, config, [{"role": "user", "content": "caf\ud83d"}])
    str(caught.value).encode()
    with pytest.raises(LVLMError, match="cannot take"):
        inputs.token_ids(pocket, "caf\ud83d")
    processor = copy.deepcopy(pocket)
    processor.tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    number = processor.tokenizer.convert_tokens_to_ids("<|new|>")
    assert number == config.text.vocab_size
    user = {"role": "user", "content": "How many <|new|>?"}
    with pytest.raises(LVLMError, match=f"wrote token {number}.*0 to {number - 1}"):
        inputs.from_messages(processor, config, [user])
    with pytest.raises(LVLMError, match=f"row 3.*wrote token {number}"):
        Encoder(processor, config).conversation(Conversation((), [user, assistant("Hi")], "3"))


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
USERS_ALONE = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


def test_a_template_without_a_system_role_is_one_line(with_template):
    for template, reason in (
        (NO_SYSTEM, "refuses the conversation: no system"), (USERS_ALONE, "does not write it"),
    ):  # fmt: skip
        match = f"no place for the system prompt 'Be brief.': .*{reason}.* --system none"
        with pytest.raises(LVLMError, match=match) as caught:
            templates.check_system(with_template(template), "Be brief.")
        assert "\n" not in str(caught.value)
        templates.check_system(with_template(template), "")  # none is no problem
    for template in (USERS_LISTS, STRINGS, LISTS):
        templates.check_system(with_template(template), "Be brief.")
