"""What a family's configuration may say, and how families come to be known."""

import dataclasses
import inspect
from pathlib import Path

import flax.linen as nn
import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models import family
from lvlm_jax.weights import model_config, names

FIELDS = {field.name for field in dataclasses.fields(models.FamilyConfig)}
HOOKS = {
    name: value for name, value in vars(models.FamilyConfig).items() if not name.startswith("_") and name not in FIELDS
}
CONFIGS = sorted({entry.config for entry in models.FAMILIES.values()}, key=lambda config: config.__name__)


def function(value):
    """What a method, class method or property runs."""
    return getattr(value, "fget", None) or getattr(value, "__func__", value)


def test_every_hook_is_documented():
    assert {"blank", "from_hf", "pictures", "placed", "shown", "token_map", "nested_images"} <= HOOKS.keys()
    for name in FIELDS | HOOKS.keys():
        documented = inspect.getdoc(HOOKS.get(name)) if callable(function(HOOKS.get(name))) else None
        assert documented or f"\n        {name}: " in models.FamilyConfig.__doc__, name
    assert models.FamilyConfig.__abstractmethods__ == {"blank", "from_hf", "pictures", "token_map"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_families_answer_hooks_and_document_what_is_their_own(config):
    assert issubclass(config, models.FamilyConfig) and not config.__abstractmethods__
    assert config.__dataclass_params__.frozen
    own = {field.name for field in dataclasses.fields(config)}
    for owner in config.__mro__[: config.__mro__.index(models.FamilyConfig)]:
        for name, value in vars(owner).items():
            if name.startswith("_") or name in own:
                continue
            if name in HOOKS:
                same = type(value) is type(HOOKS[name]) or HOOKS[name] is None
                assert same, f"{owner.__name__}.{name} is no hook of the same kind"
                if callable(function(value)):
                    ours, theirs = (inspect.signature(function(one)) for one in (value, HOOKS[name]))
                    assert [*ours.parameters] == [*theirs.parameters], f"{owner.__name__}.{name}"
            else:
                assert inspect.getdoc(function(value)), f"{owner.__name__}.{name} has no docstring"


def test_a_family_registers_itself(monkeypatch):
    monkeypatch.setattr(family, "FAMILIES", dict(models.FAMILIES))
    monkeypatch.setattr(family, "PUBLISHED_AS", {})

    class Example(family.VisionLanguageModel):
        config: models.FamilyConfig

    assert family.family("example", "other", published_as="another")(Example) is Example
    assert family.FAMILIES["example"] == family.FAMILIES["other"] == (models.FamilyConfig, Example)
    assert family.PUBLISHED_AS == {"another": "example"}
    with pytest.raises(ValueError, match="model_type 'llava' of Example is that of Llava"):
        family.family("llava")(Example)
    assert issubclass(Example, nn.Module)


def test_configurations_that_no_family_takes():
    for given in ("bert", None, ["llava"]):
        with pytest.raises(LVLMError, match="is not supported; expected one of gemma3, glm4v, "):
            models.config_from_hf({"model_type": given})
    config = model_config(Path(names.checkpoint("pocket")))
    assert config.text.vocab_size == 1280
    for change in ({"pad_token_id": 1280}, {"eos_token_ids": (2, 1300)}):
        with pytest.raises(LVLMError, match="_token_id is 1[23].0, and .* rows for 0 to 1279"):
            dataclasses.replace(config, **change)
