import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import finetune, registry, settings


@pytest.fixture
def file(tmp_path):
    """A config file; call it with the lines that change the base."""

    def write(*lines):
        path = tmp_path / "config.py"
        body = "".join(f"    {line}\n" for line in lines)
        path.write_text(
            "from lvlm_jax.training import settings\n"
            "def get_config():\n    config = settings.base('dpo')\n"
            f"{body}    return config\n"
        )
        return path

    return write


def test_a_file_and_a_command_line_change_the_base(file):
    path = file("config.optimizer.peak = 1")
    words = ["--config.lora.rank=4", "--config.data", "a b.jsonl", "--config.optimizer.warmup=100"]
    config = settings.read(path, words)
    assert (config.recipe, config.lora.rank, config.data) == ("dpo", 4, "a b.jsonl")
    assert (config.optimizer.peak, config.optimizer.warmup, config.batch) == (1.0, 100.0, 16)
    settings.check(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.optimizer.pek=1"], "no key optimizer.pek; did you mean optimizer.peak?"),
        (["--config.rank=1"], "no key rank; did you mean lora.rank?"),
        (["--config.batch=many"], "--config.batch=many: invalid literal"),
        (["--config.batch=1.5"], "--config.batch=1.5: invalid literal"),
        (["--batch=3"], "Unknown command line flag 'batch'; settings are given as --config.key=value"),
        (["batch=3"], "'batch=3' is not understood; settings are given as --config.key=value"),
    ],
    ids=str,
)
def test_words_that_change_nothing_there_is(file, words, message):
    with pytest.raises(LVLMError, match=message) as raised:
        settings.read(file(), words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.rnak = 3", 'Key "rnak" does not exist'),
        ("config.batch = 'many'", "batch"),
        ("raise OSError('no such disk')", "no such disk"),
    ],
    ids=str,
)
def test_files_that_cannot_be_used(file, line, message):
    with pytest.raises(LVLMError, match=message):
        settings.read(file(line))


def test_a_key_that_was_added_or_lost_is_named():
    config = settings.base("dpo").unlock()
    config.lora.ranks = 3
    with pytest.raises(LVLMError, match="unknown key lora.ranks; did you mean lora.rank?"):
        settings.check(config)
    config = settings.base("dpo").unlock()
    del config["accumulate"]
    with pytest.raises(LVLMError, match="the config has no accumulate"):
        settings.check(config)


SHARED = "sft"
REFUSED = [
    (SHARED, {"batch": 0}, "batch is 0; expected at least 1"),
    (SHARED, {"lora.rank": 0}, "lora.rank is 0; expected at least 1"),
    (SHARED, {"accumulate": 3}, "batch is 16 and accumulate 3"),
    (SHARED, {"dtype": "float16"}, "dtype is 'float16'; expected float32 or bfloat16"),
    (SHARED, {"epochs": 0.0}, "epochs is 0.0; expected a number above 0"),
    (SHARED, {"steps": -1}, "steps is -1"),
    (SHARED, {"too_long": "cut"}, "too_long is 'cut'; expected error or drop"),
    (SHARED, {"optimizer.peak": 0.0}, "optimizer.peak is 0.0; expected a learning rate above 0"),
    (SHARED, {"optimizer.beta2": 1.0}, "optimizer.beta2 is 1.0"),
    (SHARED, {"loop.log_every": 0}, "loop.log_every is 0"),
    ("dpo", {"preference.loss": "kto"}, "the loss 'kto' names 'kto'; expected sigmoid, "),
    ("dpo", {"preference.method": "cmac"}, "preference.method is 'cmac'"),
    ("capl", {"preference.reference": "none"}, "preference.reference is 'none'"),
    ("capl", {"preference.beta": 0.0}, "preference.beta is 0.0"),
    ("dpo", {"preference.nll": -1.0}, "preference.nll is -1.0"),
    ("dpo", {"preference.label_smoothing": 0.5}, "preference.label_smoothing is 0.5"),
    ("dpo", {"preference.label_smoothing": 0.1, "preference.loss": "ipo"}, "label_smoothing belongs to sigmoid, "),
    ("capl", {"lora.enabled": False}, "set preference.reference='precomputed'"),
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


@pytest.mark.parametrize(("recipe", "method", "nll", "rho"), [("capl", "capl", 1.0, 0.95), ("dpo", "none", 0.0, 0.95)])
def test_what_the_files_of_configs_set(recipe, method, nll, rho):
    found = settings.read(f"configs/{recipe}.py").preference
    assert (found.method, found.nll, found.rho) == (method, nll, rho)


def test_a_rank_matters_only_with_adapters():
    config = settings.base("sft")
    config.lora.update(enabled=False, rank=0)
    settings.check(config)


@pytest.mark.parametrize("recipe", ["", "soup"])
def test_an_unknown_recipe_is_named(tmp_path, recipe):
    config = settings.base()
    config.recipe = recipe
    with pytest.raises(LVLMError, match=f"recipe '{recipe}' is unknown; expected one of capl, dpo, flow"):
        settings.check(config)
    with pytest.raises(LVLMError, match=f"recipe '{recipe}' is unknown"):
        finetune.train(config, tmp_path)


def test_a_config_has_the_section_of_its_objective_alone():
    shared = {field for field in settings.base("sft")}
    sections = {name: set(settings.base(name)) - shared for name in ("capl", "dpo", "flow_alignment")}
    assert sections == {"capl": {"preference"}, "dpo": {"preference"}, "flow_alignment": {"flow"}}


def test_a_setting_of_another_objective_is_refused_by_name():
    belongs = "preference.beta, which belongs to recipe capl and dpo, and recipe is 'sft'; leave it out, or begin"
    with pytest.raises(LVLMError, match=f"the config has no key {belongs}"):
        settings.read("configs/sft.py", ["--config.preference.beta=0.2"])
    config = settings.base("sft").unlock()
    config.preference = {"beta": 0.2}
    with pytest.raises(LVLMError, match=f"the config has an unknown key {belongs}"):
        settings.check(config)


def test_a_file_may_set_its_recipe_itself():
    """As files did before `base` took the recipe's name: they have every section."""
    config = settings.base()
    config.recipe = "dpo"
    config.preference.beta = 0.2
    assert config.preference.method == "capl" and config.flow.mu == 1.0
    settings.check(config)
    config.flow.mu = 2.0
    with pytest.raises(LVLMError, match="key flow.mu, which belongs to recipe flow_alignment, and recipe is 'dpo'"):
        settings.check(config)


def test_the_command_line_may_change_the_recipe():
    settings.check(settings.read("configs/dpo.py", ["--config.recipe=sft"]))
    with pytest.raises(LVLMError, match=r"the config has no flow.kappa; begin it with .*base\('flow_alignment'\)"):
        settings.check(settings.read("configs/sft.py", ["--config.recipe=flow_alignment"]))


def test_every_field_is_described():
    for recipe in (entry.name for entry in registry.all_objectives()):
        described = {field.name: field for field in settings.describe(settings.base(recipe))}
        assert all(field.doc for field in described.values()), recipe
        entry = registry.find(recipe)
        assert entry.defaults.keys() == entry.docs.keys()
        for name, default in entry.defaults.items():
            assert described[f"{entry.section}.{name}"].default == default
