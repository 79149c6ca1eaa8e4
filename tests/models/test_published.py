"""Every tensor of the published checkpoints has its place: names and shapes against transformers', by config.json.

`published/*.json` holds, for each family, what the published files share, what they differ in, how many billions of
parameters they have, what our configuration must say of them, and how to leave out layers.
"""

import json
import operator
from pathlib import Path

import pytest
import torch

from lvlm_jax import models
from lvlm_jax.weights.save import stored_shapes
from tests.models.families import FAMILIES
from tests.models.families.base import merged

FILES = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "published").glob("*.json")}
SIZES = [(name, size) for name, file in FILES.items() for size in file.get("sizes", ())]
QUICK = "SmolVLM2-256M-Video-Instruct"  # with layers of two digits


def transformers_state(name, raw):
    """Tensors without data of transformers' own model, without the copy of a tied embedding."""
    configuration, build = FAMILIES[name].classes
    with torch.device("meta"):
        model = build(configuration.from_dict(raw))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return {key: tensor for key, tensor in model.state_dict().items() if not (tied and key == "lm_head.weight")}


def assert_same_tensors(name, raw, scheme="state_dict"):
    want = {key: tuple(tensor.shape) for key, tensor in transformers_state(name, raw).items()}
    assert stored_shapes(models.config_from_hf(raw), scheme) == want


def published(name, size):
    return merged(FILES[name]["shared"], FILES[name]["sizes"][size]["config"])


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_what_our_configuration_says(name, size):
    file, config = FILES[name], models.config_from_hf(published(name, size))
    for path, want in (file["expected"] | file["sizes"][size].get("expected", {})).items():
        got = operator.attrgetter(path)(config)
        assert (list(got) if isinstance(got, tuple) else got) == want, path


def all_but(quick):
    """All sizes; those that are not wanted quickly are marked."""
    return [one if one[1] in quick else pytest.param(*one, marks=pytest.mark.slow) for one in SIZES]


FIRST = {next(iter(file["sizes"])) for file in FILES.values() if file.get("sizes")}
ENDS = {size for file in FILES.values() for size in [*file.get("sizes", ())][:: max(1, len(file.get("sizes", ())) - 1)]}


@pytest.mark.parametrize(("name", "size"), all_but(FIRST))
def test_how_many_parameters_the_model_of_transformers_has(name, size):
    count = sum(tensor.numel() for tensor in transformers_state(name, published(name, size)).values())
    assert count / 1e9 == pytest.approx(FILES[name]["sizes"][size]["billions"], **FILES[name]["tolerance"])


@pytest.mark.parametrize(("name", "size"), all_but(ENDS))
def test_tensors_of_all_widths(name, size):
    """Of models with few layers."""
    shallow = merged(published(name, size), FILES[name]["shallow"])
    assert_same_tensors(name, shallow)
    if "hub" in FILES[name]:
        assert set(FILES[name]["hub"]) <= set(stored_shapes(models.config_from_hf(shallow), "hub"))


@pytest.mark.parametrize(("name", "size"), all_but({QUICK}))
def test_tensors_of_all_layers(name, size):
    assert_same_tensors(name, published(name, size))


def test_every_family_has_published_files():
    assert set(FILES) == set(FAMILIES) - {"llava"}  # whose published sizes are in tests/weights
