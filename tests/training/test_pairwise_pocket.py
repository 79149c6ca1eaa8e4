"""The losses of preference learning and their gradients on the pocket model: transformers in float64, and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lvlm_jax import LVLM, models
from lvlm_jax.training import pairwise
from lvlm_jax.training import preference_losses as preference
from lvlm_jax.training.data.pair_batches import PAIR
from lvlm_jax.weights import lora, parts
from lvlm_jax.weights.tables import flatten, unflatten
from tests.reference import capl, llava
from tests.reference.preference import Losses, sequence_logits, token_logprobs
from tests.training import pair_sets

pytestmark = pytest.mark.slow

SCALE = 2.0  # alpha / rank
PLAIN = [("sigmoid", 0.1), ("ipo", 0.3), ("hinge", 0.01)]


@pytest.fixture(scope="module")
def base():
    return LVLM.from_pretrained("pocket")


@pytest.fixture(scope="module")
def adapted(base):
    """(adapters, frozen): a policy that differs from its reference."""
    adapters, frozen = lora.attach(base.params, 4, 4 * SCALE, lora.TARGETS, 0.0, jax.random.key(0))
    return drawn(adapters, seed=1), frozen


def drawn(like, seed):
    rng = np.random.default_rng(seed)
    return unflatten(
        {path: jnp.asarray(rng.normal(0, 0.05, x.shape), jnp.float32) for path, x in flatten(like).items()}
    )


@pytest.fixture(scope="module")
def task(base, tmp_path_factory):
    """CAPL over three pairs, two of them about two images."""
    data = pair_sets.write(tmp_path_factory.mktemp("pairs"), pair_sets.PAIRS[:3], side=96)
    settings = pair_sets.config(data, batch=3, length=512, method="capl", nll=1.0)
    return pairwise.task(base, models.build(base.config), settings, data.parent)


def answers_of(batch):
    """Per pair and answer: unpadded ids, the pair's pixels, and where the answer starts."""
    images = iter(batch["images"])
    for row in range(len(batch["ids"])):
        pixels = np.stack([next(images) for _ in range(batch["chosen"]["image_id"][row].max())])
        for name in PAIR:
            ids = batch[name]["tokens"][row][batch[name]["image_id"][row] >= 0]
            yield ids, pixels, len(ids) - batch[name]["answers"][row].sum()


def saved(base, params, folder):
    """transformers' model with these parameters, in float64."""
    LVLM(params, base.config, base.folder).save_pretrained(folder)
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def torch_logprobs(model, batch):
    found = []
    for ids, pixels, start in answers_of(batch):
        ids, pixels = torch.tensor(ids[None].astype(np.int64)), torch.tensor(pixels, dtype=torch.float64)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[0]
        scores = torch.log_softmax(logits[start - 1 : -1], dim=-1)
        found.append(torch.gather(scores, 1, ids[0, start:, None])[:, 0])
    return found


def torch_loss(policy, reference, loss, beta):
    losses = []
    for pair in range(0, len(policy), 2):
        take = torch.mean if loss == "ipo" else torch.sum
        chosen, rejected = (take(policy[pair + i] - reference[pair + i]) for i in range(2))
        h = chosen - rejected
        if loss == "sigmoid":
            losses.append(-torch.nn.functional.logsigmoid(beta * h))
        elif loss == "ipo":
            losses.append((h - 1 / (2 * beta)) ** 2)
        else:
            losses.append(torch.relu(1 - beta * h))
    return torch.stack(losses).mean()


def lora_gradient(model, adapters):
    """From the gradient of merged kernels that of their factors, by path: W = W0 + scale · A B."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    flat, found = flatten(adapters), {}
    for module in {path.rpartition("/")[0] for path in flat}:
        change = grads[name_of(module, grads)].numpy().T  # [in, out]
        a, b = (np.asarray(flat[f"{module}/{factor}"], np.float64) for factor in ("lora_a", "lora_b"))
        found |= {f"{module}/lora_a": SCALE * change @ b.T, f"{module}/lora_b": SCALE * a.T @ change}
    return found


def name_of(module, names):
    """transformers' name of the kernel of one of the language model's projections."""
    _, layer, block, projection = module.split("/")
    ending = f"layers.{layer.removeprefix('layers_')}.{block}.{projection}.weight"
    (name,) = (name for name in names if name.endswith(ending) and "language_model" in name)
    return name


def merged(trainable, weights):
    """`weights` of the NumPy model with the adapters in them."""
    flat, moved = flatten(trainable), dict(weights)
    for module in {path.rpartition("/")[0] for path in flat}:
        name = name_of(module, weights)
        moved[name] = weights[name] + SCALE * (flat[f"{module}/lora_a"] @ flat[f"{module}/lora_b"]).T
    return moved


def test_plain_losses_and_their_gradients_equal_torch(base, task, adapted, tmp_path):
    scorer = pairwise.Scorer(models.build(base.config), None, 2)
    batch = task.source(0)

    def losses(trainable, frozen, batch):
        policy, mask = scorer.logprobs(parts.join(trainable, frozen), batch, scorer.image_tokens(frozen, batch))
        reference = scorer.alone(frozen, batch)
        every = [preference.metrics(policy, reference, mask, batch["weight"], loss, beta) for loss, beta in PLAIN]
        values = jnp.stack([metrics["preference"].value for metrics in every])
        return values, values

    jacobian, values = jax.jit(jax.jacrev(losses, has_aux=True))(*adapted, batch)
    policy = saved(base, lora.merge(parts.join(*adapted)), tmp_path / "policy")
    with torch.no_grad():
        reference = torch_logprobs(saved(base, base.params, tmp_path / "reference"), batch)
    scores = torch_logprobs(policy, batch)
    for index, (loss, beta) in enumerate(PLAIN):
        policy.zero_grad()
        expected = torch_loss(scores, reference, loss, beta)
        expected.backward(retain_graph=True)
        np.testing.assert_allclose(values[index], expected.item(), rtol=1e-5, atol=1e-5, err_msg=loss)
        wanted = lora_gradient(policy, adapted[0])
        largest = max(np.abs(leaf).max() for leaf in wanted.values())
        for path, leaf in flatten(jacobian).items():
            np.testing.assert_allclose(
                leaf[index], wanted[path], rtol=0, atol=1e-5 * max(largest, 1), err_msg=f"{loss} {path}"
            )
        assert largest > 1e-3


def test_capl_and_its_gradient_equal_numpy(base, task, adapted, tmp_path):
    """The gradient along a random direction, against central differences."""
    batch = task.source(0)

    def total(trainable, frozen, batch):
        metrics = task.objective(trainable, frozen, batch, None)
        return metrics["preference"].value + metrics["nll"].value

    value, gradient = jax.jit(jax.value_and_grad(total))(*adapted, batch)
    torch_model = saved(base, base.params, tmp_path / "base")
    weights, config = llava.from_torch(torch_model)
    answers = list(answers_of(batch))

    def logprobs(model):
        return [
            token_logprobs(sequence_logits(model, config, ids, pixels, capl.Capl()), ids, start)
            for ids, pixels, start in answers
        ]

    reference = logprobs(weights)

    def objective(trainable):
        policy = logprobs(merged(trainable, weights))
        pairs = [(policy[i], policy[i + 1], reference[i], reference[i + 1]) for i in range(0, len(answers), 2)]
        return Losses("sigmoid", 0.1, 0.0, 1.0).mean(pairs)["objective"]

    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapted[0])
    direction = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn(adapted[0], seed=2))
    np.testing.assert_allclose(value, objective(start), rtol=1e-5)
    step = 1e-4
    up, down = (
        objective(jax.tree.map(lambda x, v, sign=sign: x + sign * step * v, start, direction)) for sign in (1, -1)
    )
    found = sum(
        np.sum(np.asarray(g, np.float64) * v)
        for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(found, (up - down) / (2 * step), rtol=1e-5, atol=1e-5)
