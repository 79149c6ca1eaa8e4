import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import registry, settings


@pytest.fixture
def file(tmp_path):
    """A config file; call it with the line that changes the base."""

    def write(line="pass"):
        body = f"def get_config():\n    config = settings.base('dpo')\n    {line}\n    return config\n"
        (tmp_path / "config.py").write_text(f"from lvlm_jax.training import settings\n{body}")
        return tmp_path / "config.py"

    return write


def test_a_file_and_a_command_line_change_the_base(file):
    words = ["--config.lora.rank=4", "--config.data", "a b.jsonl", "--config.optimizer.warmup=100"]
    config = settings.read(file("config.optimizer.peak = 1"), words)
    assert (config.recipe, config.lora.rank, config.data) == ("dpo", 4, "a b.jsonl")
    assert (config.optimizer.peak, config.optimizer.warmup, config.batch) == (1.0, 100.0, 16)
    settings.check(config)


@pytest.mark.parametrize(
    ("line", "word", "message"),
    [
        ("pass", "--config.optimizer.pek=1", "no key optimizer.pek; did you mean optimizer.peak?"),
        ("pass", "--config.rank=1", "no key rank; did you mean lora.rank?"),
        ("pass", "--config.batch=many", "--config.batch=many: invalid literal"),
        ("pass", "--config.batch=1.5", "--config.batch=1.5: invalid literal"),
        ("pass", "--batch=3", "Unknown command line flag 'batch'; settings are given as --config.key=value"),
        ("pass", "batch=3", "'batch=3' is not understood; settings are given as --config.key=value"),
        ("config.rnak = 3", None, 'Key "rnak" does not exist'),
        ("config.batch = 'many'", None, "batch"),
        ("raise OSError('no such disk')", None, "no such disk"),
    ],
)
def test_words_that_change_nothing_there_is_and_files_that_cannot_be_used(file, line, word, message):
    with pytest.raises(LVLMError, match=f"^[^\n]*{message}[^\n]*\\Z"):
        settings.read(file(line), [word] if word else ())


def test_a_key_that_was_added_or_lost_is_named():
    added, lost, foreign = (settings.base("dpo").unlock() for _ in range(3))
    added.lora.ranks = 3
    del lost["accumulate"]
    foreign.flow = {"mu": 2.0}
    for config, message in (
        (added, "unknown key lora.ranks; did you mean lora.rank?"),
        (lost, "the config has no accumulate"),
        (foreign, "the config has an unknown key flow.mu, which belongs to recipe flow_alignment, and recipe is 'dpo'"),
    ):
        with pytest.raises(LVLMError, match=message):
            settings.check(config)
    belongs = "preference.beta, which belongs to recipe capl and dpo, and recipe is 'sft'; leave it out, or begin"
    with pytest.raises(LVLMError, match=f"the config has no key {belongs}"):
        settings.read("configs/sft.py", ["--config.preference.beta=0.2"])


REFUSED = [
    ("sft", {"batch": 0}, "batch is 0; expected at least 1"),
    ("sft", {"lora.rank": 0}, "lora.rank is 0; expected at least 1"),
    ("sft", {"accumulate": 3}, "batch is 16 and accumulate 3"),
    ("sft", {"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    ("sft", {"epochs": 0.0}, "epochs is 0.0; expected a number above 0"),
    ("sft", {"steps": -1}, "steps is -1"),
    ("sft", {"too_long": "cut"}, "too_long is 'cut'; expected error or drop"),
    ("sft", {"optimizer.peak": 0.0}, "optimizer.peak is 0.0; expected a learning rate above 0"),
    ("sft", {"optimizer.beta2": 1.0}, "optimizer.beta2 is 1.0"),
    ("sft", {"loop.log_every": 0}, "loop.log_every is 0"),
    ("dpo", {"preference.loss": "kto"}, "the loss 'kto' names 'kto'; expected sigmoid, "),
    ("dpo", {"preference.method": "cmac"}, "preference.method is 'cmac'"),
    ("capl", {"preference.reference": "none"}, "preference.reference is 'none'"),
    ("capl", {"preference.beta": 0.0}, "preference.beta is 0.0"),
    ("dpo", {"preference.nll": -1.0}, "preference.nll is -1.0"),
    ("dpo", {"preference.label_smoothing": 0.5}, "preference.label_smoothing is 0.5"),
    ("dpo", {"preference.label_smoothing": 0.1, "preference.loss": "ipo"}, "label_smoothing belongs to sigmoid, "),
    ("capl", {"lora.enabled": False, "preference.reference": "adapter_off"}, "set preference.reference='precomputed'"),
    ("sft", {"quant": "int4"}, "quant is 'int4'; expected int8, or empty"),
    ("sft", {"length_groups": 0}, "length_groups is 0"),
    ("sft", {"lora.enabled": False, "lora.rslora": True}, "lora.start and lora.rslora belong to adapters"),
    ("flow_alignment", {"flow.stage": "3"}, "flow.stage is '3'; expected one of 1, 2, both"),
    ("flow_alignment", {"flow.mu": -1.0}, "flow.mu is -1.0; expected a weight of at least 0"),
    ("simpo", {"simpo.beta": 0.0}, "simpo.beta is 0.0; expected a number above 0"),
    ("simpo", {"simpo.gamma": -0.1}, "simpo.gamma is -0.1; expected a margin of at least 0"),
    ("simpo", {"simpo.label_smoothing": 0.5}, "simpo.label_smoothing is 0.5; expected a share"),
]


@pytest.mark.parametrize(("recipe", "values", "message"), REFUSED, ids=str)
def test_values_that_make_no_sense(recipe, values, message):
    config = settings.base(recipe)
    config.update_from_flattened_dict(values)
    with pytest.raises(LVLMError, match=message):
        settings.check(config)


def test_what_the_files_of_configs_set():
    found = {name: settings.read(f"configs/{name}.py").preference for name in ("capl", "dpo")}
    assert {name: (one.method, one.nll, one.rho) for name, one in found.items()} == {
        "capl": ("capl", 1.0, 0.95), "dpo": ("none", 0.0, 0.95)
    }  # fmt: skip
    without_adapters = settings.base("sft")
    without_adapters.lora.update(enabled=False, rank=0)  # a rank matters only with them
    settings.check(without_adapters)


def test_a_file_may_set_its_recipe_itself_and_the_command_line_change_it():
    """As files did before `base` took the recipe's name: they have every section."""
    config = settings.base()
    with pytest.raises(LVLMError, match="recipe '' is unknown; expected one of capl, dpo, flow"):
        settings.check(config)
    config.recipe, config.preference.beta = "dpo", 0.2
    assert config.preference.method == "capl" and config.flow.mu == 1.0
    settings.check(config)
    config.flow.mu = 2.0
    with pytest.raises(LVLMError, match="key flow.mu, which belongs to recipe flow_alignment, and recipe is 'dpo'"):
        settings.check(config)
    settings.check(settings.read("configs/dpo.py", ["--config.recipe=capl"]))
    for recipe, key in (("flow_alignment", "flow.kappa"), ("sft", "sft.method")):
        with pytest.raises(LVLMError, match=rf"the config has no {key}; begin it with .*base\('{recipe}'\)"):
            settings.check(settings.read("configs/dpo.py", [f"--config.recipe={recipe}"]))


def test_a_config_has_the_section_of_its_objective_alone_and_every_field_is_described():
    shared = set(settings.base("sft")) - {"sft"}
    for entry in registry.all_objectives():
        config = settings.base(entry.name)
        assert set(config) - shared == ({entry.section} if entry.section else set())
        described = {field.name: field for field in settings.describe(config)}
        assert all(field.doc for field in described.values()), entry.name
        assert entry.defaults.keys() == entry.docs.keys()
        for name, default in entry.defaults.items():
            assert described[f"{entry.section}.{name}"].default == default
