"""LoRA: exact where it does nothing, equal merged and unmerged, its dropout unbiased."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM, models
from lvlm_jax.attention.context import Context
from lvlm_jax.models.layers import Linear, linear
from lvlm_jax.parallel import make_mesh, parameter_sharding
from lvlm_jax.weights import lora, parts
from lvlm_jax.weights.tables import flatten, unflatten
from tests.refusals import refused
from tests.weights.checkpoints import adapted

KEY = jax.random.key(0)
EVERYWHERE = r"(_proj|fc\d|linear_\d|lm_head)$"


def module_and_leaves(dtype=jnp.float32, rate=None):
    """A projection of 24 to 10 numbers with an adapter of rank 4, and 5 rows of input."""
    rng = np.random.default_rng(2)
    shapes = {"kernel": (24, 10), "bias": (10,), "lora_a": (24, 4), "lora_b": (4, 10)}
    leaves = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    leaves["lora_scale"] = jnp.float32(0.75)
    if rate is not None:
        leaves["lora_dropout"] = jnp.float32(rate)
    x = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    return linear(10, jnp.dtype(dtype), None, use_bias=True), leaves, x


def low_rank_term(leaves, x):
    a, b = (np.asarray(leaves[name], np.float64) for name in ("lora_a", "lora_b"))
    return float(leaves["lora_scale"]) * (np.asarray(x, np.float64) @ a) @ b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bias", [True, False])
def test_without_an_adapter_it_is_a_dense_layer(dtype, bias):
    """The same parameters and the same operations, so that no program is slower for LoRA. Of few rows: `native`."""
    dtype, x = jnp.dtype(dtype), jnp.ones((4, 50, 6))
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    ours = linear(4, dtype, None, use_bias=bias)
    plain = nn.Dense(4, bias, dtype=dtype, precision=precision, kernel_init=nn.initializers.normal(0.02))
    made = ours.init(KEY, x)
    assert set(made["params"]) == {"kernel", "bias"} - (set() if bias else {"bias"})
    chex.assert_trees_all_equal(made, plain.init(KEY, x), strict=False)
    if dtype == jnp.float32:
        assert str(jax.make_jaxpr(ours.apply)(made, x)) == str(jax.make_jaxpr(plain.apply)(made, x))
    # On a CPU 16-bit products are float32 ones; elsewhere they are those of nn.Dense.
    traced = [jax.jit(module.apply).trace(made, x) for module in (ours, plain)]
    texts = [one.lower(lowering_platforms=("tpu",)).as_text() for one in traced]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_the_low_rank_term(dtype, tolerance):
    module, leaves, x = module_and_leaves(dtype)
    kernel, bias = (np.asarray(leaves[name], np.float64) for name in ("kernel", "bias"))
    expected = np.asarray(x, np.float64) @ kernel + bias + low_rank_term(leaves, x)
    got = module.apply({"params": leaves}, x)
    assert got.dtype == dtype and np.abs(low_rank_term(leaves, x)).mean() > 5
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=tolerance / 10, atol=tolerance)


def test_fresh_adapters_change_no_bit(model, mixed):
    """Logits with images, and through prefill and decode."""
    adapters, frozen = lora.attach_adapters(model.params, 4, 8.0, EVERYWHERE, 0.0, KEY)
    forced = np.random.default_rng(3).integers(3, 250, (2, 3)).astype(np.int32)

    def run(params):
        other = LVLM(params, model.config)
        state, step = other.prefill(mixed)
        found = [other.logits(mixed), step.combined]
        for tokens in forced:
            state, step = other.decode(state, tokens)
            found.append(step.combined)
        return found

    chex.assert_trees_all_equal(run(parts.join(adapters, frozen)), run(model.params))


def test_merged_equals_unmerged(model, mixed):
    params = parts.join(*adapted(model.params, EVERYWHERE))
    merged = lora.merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(model.params)
    valid = mixed["attention_mask"].astype(bool)
    trees = (params, merged, model.params)
    unmerged_logits, merged_logits, base = (np.asarray(LVLM(tree, model.config).logits(mixed))[valid] for tree in trees)
    assert np.abs(unmerged_logits - base).max() > 0.1
    np.testing.assert_allclose(merged_logits, unmerged_logits, rtol=0, atol=1e-5)


def test_merging_is_the_formula_and_keeps_dtype_and_the_rest(model):
    _, leaves, _ = module_and_leaves()
    params = {"up": {**leaves, "kernel": leaves["kernel"].astype(jnp.bfloat16)}, "norm": {"scale": jnp.ones(3)}}
    merged = lora.merge(params)
    assert set(flatten(merged)) == {"up/kernel", "up/bias", "norm/scale"}
    assert merged["up"]["kernel"].dtype == jnp.bfloat16
    exact = np.asarray(params["up"]["kernel"], np.float64) + low_rank_term(leaves, np.eye(24))
    np.testing.assert_array_equal(merged["up"]["kernel"], jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    assert merged["norm"]["scale"] is params["norm"]["scale"]
    _, frozen = lora.attach_adapters(model.params, 2, 4.0, lora.TARGETS, 0.1, KEY)  # the frozen part merged is the base
    assert flatten(lora.merge(frozen)) == flatten(model.params)


def test_what_is_attached(model):
    assert not [path for path in flatten(models.abstract_parameters(model.config)) if "lora" in path]
    adapters, frozen = lora.attach_adapters(model.params, 4, 6.0, lora.TARGETS, 0.25, KEY)
    names = [f"self_attn/{name}_proj" for name in "qkvo"] + [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    modules = {f"language_model/layers_{i}/{name}" for i in (0, 1) for name in names}
    flat, constants = flatten(adapters), flatten(frozen)
    assert set(flat) == {f"{module}/{leaf}" for module in modules for leaf in ("lora_a", "lora_b")}
    for module in modules:
        rows, columns = constants[f"{module}/kernel"].shape
        a, b = flat[f"{module}/lora_a"], flat[f"{module}/lora_b"]
        assert (a.shape, b.shape) == ((rows, 4), (4, columns)) and not b.any()
        # Uniform in ±1/√in: within the bound, and of its standard deviation.
        assert 0.9 / rows**0.5 < jnp.abs(a).max() <= 1 / rows**0.5
        assert float(a.std()) == pytest.approx((3 * rows) ** -0.5, rel=0.15)
        assert constants.pop(f"{module}/lora_scale") == 1.5
        assert constants.pop(f"{module}/lora_dropout") == 0.25
    assert constants == flatten(model.params)
    assert len({np.asarray(leaf).tobytes() for path, leaf in flat.items() if path.endswith("_a")}) == len(modules)


@pytest.fixture(scope="module")
def hidden(model):
    """jitted (adapters, frozen, key or None) -> hidden states of two random rows of embeddings."""
    module = models.build(model.config)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 2, 7, 48)), jnp.float32)
    positions, zero = jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.zeros((), jnp.int32)
    context = Context(jnp.zeros((2, 7), jnp.int32), positions, first_row=zero, image_end=jnp.zeros((2,), jnp.int32))

    @jax.jit
    def hidden(adapters, frozen, key=None):
        params, rngs = {"params": parts.join(adapters, frozen)}, {} if key is None else {"dropout": key}
        return module.apply(params, x, context, method="decode", rngs=rngs).hidden

    return hidden


def test_only_adapters_get_gradients_and_at_first_only_b(model, hidden):
    adapters, frozen = lora.attach_adapters(model.params, 4, 8.0, "layers_1/mlp/up_proj$", 0.0, KEY)
    found = flatten(jax.grad(lambda *both: jnp.sin(hidden(*both)).sum())(adapters, frozen))
    a, b = (f"language_model/layers_1/mlp/up_proj/{name}" for name in ("lora_a", "lora_b"))
    assert set(found) == {a, b} and not found[a].any() and found[b].any()


def test_dropout_acts_with_an_rng_alone_and_on_the_adapter_alone(model, hidden):
    adapters, frozen = adapted(model.params, dropout=0.5)
    plain, first, second = (hidden(adapters, frozen), *(hidden(adapters, frozen, jax.random.key(k)) for k in (1, 2)))
    np.testing.assert_array_equal(first, hidden(adapters, frozen, jax.random.key(1)))
    assert np.abs(first - plain).max() > 0.01 and np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(hidden({}, frozen, jax.random.key(1)), hidden({}, model.params))
    without = adapted(model.params, dropout=0.0)  # nothing is drawn where there is no rate
    assert "random_bits" not in str(jax.make_jaxpr(hidden)(*without, KEY))


def test_dropout_under_remat():
    """The backward pass draws the mask of the forward pass again: the gradient is that of the loss it belongs to."""
    _, leaves, x = module_and_leaves(rate=0.5)

    class Twice(nn.Module):
        layer: type

        @nn.compact
        def __call__(self, x):
            return jnp.sin(self.layer(10, name="up")(jnp.cos(x)))

    def loss(factors, layer=Linear):
        return Twice(layer).apply({"params": {"up": leaves | factors}}, x, rngs={"dropout": KEY}).sum()

    def rematerialised(factors):
        return loss(factors, nn.remat(Linear))

    factors = {name: leaves[name] for name in ("lora_a", "lora_b")}
    value, gradient = jax.value_and_grad(rematerialised)(factors)
    assert abs(value - loss(factors)) < 1e-5
    assert "remat" in str(jax.make_jaxpr(jax.grad(rematerialised))(factors))
    for name, leaf in factors.items():
        direction = jnp.sign(gradient[name])
        up, down = (loss({**factors, name: leaf + step * direction}) for step in (1e-3, -1e-3))
        assert float(up - down) / 2e-3 == pytest.approx(float(jnp.abs(gradient[name]).sum()), rel=0.02)


def test_dropout_has_the_mean_of_no_dropout():
    module, leaves, x = module_and_leaves(rate=0.3)
    draws = 4000
    run = jax.jit(jax.vmap(lambda key: module.apply({"params": leaves}, x, rngs={"dropout": key})))
    outputs = run(jax.random.split(KEY, draws))
    expected = np.asarray(module.apply({"params": leaves}, x))
    # Each input is kept or not on its own: variances of Bernoulli(0.7) / 0.7 add up.
    through = float(leaves["lora_scale"]) * np.asarray(leaves["lora_a"]) @ np.asarray(leaves["lora_b"])
    variance = (np.asarray(x) ** 2) @ through**2 * 0.3 / 0.7
    np.testing.assert_allclose(outputs.var(0), variance, rtol=0.15)
    error = np.abs(np.asarray(outputs.mean(0)) - expected) / np.sqrt(variance / draws)
    assert error.max() < 4.5


def test_factors_are_split_as_their_kernel_is(model):
    place = parameter_sharding(make_mesh())
    for module, a, b in (
        ("language_model/layers_0/self_attn/q_proj", ("fsdp", None), (None, "tensor")),
        ("language_model/layers_0/mlp/down_proj", ("tensor", None), (None, "fsdp")),
        ("vision_tower/layers_0/self_attn/out_proj", ("tensor", None), (None, "fsdp")),
        ("language_model/lm_head", ("fsdp", None), (None, "tensor")),
        ("connector/linear_3", (None, None), (None, None)),
    ):
        assert tuple(place(f"{module}/lora_a", (8, 4)).spec) == a
        assert tuple(place(f"{module}/lora_b", (4, 8)).spec) == b
        assert all(tuple(place(f"{module}/lora_{name}", ()).spec) == () for name in ("scale", "dropout"))
    # They live on the mesh of the parameters.
    flat = {path: jax.device_put(leaf, place(path, leaf.shape)) for path, leaf in flatten(model.params).items()}
    whole = parts.join(*lora.attach_adapters(unflatten(flat), 2, 4.0, lora.TARGETS, 0.1, KEY))
    for path, leaf in flatten(whole).items():
        assert leaf.sharding == place(path, leaf.shape), path
    assert all(leaf.sharding == flat[path].sharding for path, leaf in flatten(lora.merge(whole)).items())


def test_settings_that_cannot_be_used(model):
    numbers = [("rank", 0), ("rank", -4), ("alpha", 0.0), ("alpha", float("nan")), ("dropout", 1.0), ("dropout", -0.1)]
    whole = parts.join(*adapted(model.params))
    for name, value, message in (
        *((name, value, f"{name} {value} ") for name, value in numbers),
        ("targets", "query_proj$", "'query_proj\\$', matches nothing"),
        ("targets", "*", "not a regular expression"),
        ("targets", "layers_1", "input_layernorm', which has no matrix"),
        *(("targets", name, f"{name}', which has no matrix") for name in ("patch_embedding", "embed_tokens")),
        ("params", whole, "already have a LoRA adapter .*merge it"),
    ):
        given = {"params": model.params, "rank": 4, "alpha": 8.0, "targets": lora.TARGETS, "dropout": 0.0}
        refused(message, lora.attach_adapters, **given | {name: value}, key=KEY)
