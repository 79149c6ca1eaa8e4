"""The registry: one file an objective, each with its config file and its row in the documentation."""

import importlib
from pathlib import Path

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import finetune, objectives, registry, settings
from lvlm_jax.training.registry import Objective, Recipe

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in Path(objectives.__path__[0]).glob("*.py") if path.stem != "__init__")


@pytest.fixture
def registered(monkeypatch):
    """Leaves the registry as it was."""
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_has_one_objective_of_its_name_a_config_and_a_row_in_the_docs(path):
    objective = registry.find(path.stem)
    assert isinstance(objective, Objective) and objective.name == path.stem
    assert bool(objective.section) == bool(objective.defaults)
    assert {check.field for check in objective.checks} <= objective.defaults.keys()
    module = importlib.import_module(f"{objectives.__name__}.{path.stem}")
    assert [entry for entry in vars(module).values() if isinstance(entry, Objective)] == [objective]
    config = settings.read(ROOT / "configs" / path.name)
    settings.check(config)
    assert config.recipe == path.stem
    assert f"| `configs/{path.name}` |" in (ROOT / "docs" / "training.md").read_text()


def test_names_are_those_of_the_files(registered):
    assert registry.names() == tuple(path.stem for path in FILES)
    assert [objective.name for objective in registry.all_objectives()] == list(registry.names())


def test_another_package_adds_an_objective(registered):
    mine = Objective("mine", lambda *_: None, "mine", {"tau": 1.0})
    registry.register(mine)
    registry.register(mine)  # as a module that is imported twice does
    assert registry.find("mine") is mine and "mine" in registry.names()
    assert settings.base("mine").mine.tau == 1.0 and settings.base().mine.tau == 1.0
    for name in ("dpo", "mine"):
        with pytest.raises(LVLMError, match=f"the recipe name '{name}' is taken"):
            registry.register(Objective(name, lambda *_: None))


def test_a_recipe_trains_by_itself(registered, tmp_path):
    registry.register(Recipe("own", lambda config, workdir: workdir / config.recipe))
    config = settings.base("sft")
    config.recipe = "own"
    assert finetune.train(config, tmp_path) == tmp_path / "own"
    with pytest.raises(LVLMError, match="recipe 'own' has its own configuration"):
        settings.base("own")
