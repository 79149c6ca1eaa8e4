"""The pocket recipes of `lvlm pocket-training`: CAPL, plain DPO and flow alignment, minutes each on two cores.

Any field may be set on the command line, as in `--config.capl.optimizer.peak=1e-4`. The recipes start from the files
with their names in this folder. The values set here were chosen once, for such a small model and so few steps, and were
not tuned on the pocket benchmark.
"""

from ml_collections import ConfigDict

from lvlm_jax import config_files


def get_config() -> ConfigDict:
    """Data, and a configuration (`lvlm_jax.training.settings`) for each training."""
    config = ConfigDict()
    config.model = "pocket"
    config.seed = 0  # seed of the prompts; held-out ones use the next seed

    # Prompts about two to four images; about a third become pairs, because the rejected answer is wrong.
    config.pairs = ConfigDict(dict(prompts=2000, held_out=500, max_new_tokens=32, batch=32))
    # Prompts about one image; a share asks for a description, because SEVI hardly changes other answers.
    config.answers = ConfigDict(dict(prompts=800, held_out=150, describe=0.7))

    for name in ("capl", "dpo", "flow_alignment"):
        recipe = config_files.load_config(name)
        # Learning rates for models a thousand times larger would change nothing in so few steps. At 5e-4, CAPL's pairs,
        # whose rejected answers the base prefers in 96 of 100, taught the model to contradict itself everywhere (73 to
        # 30).
        recipe.optimizer.peak = 5e-4 if name == "flow_alignment" else 5e-5
        recipe.loop.update(workers=0, evaluate_every=1000, save_every=50)
        config[name] = recipe
    config.capl.update(batch=8, steps=150, length=512)
    config.dpo.update(batch=8, steps=150, length=512)
    config.flow_alignment.update(batch=16, steps=300, length=256)
    # The answers' divergence is a hundredth of a nat, that of attention several nats, a sum over layers and heads. At
    # 100, the student's attention came closer and its answers went farther away (0.69 on held-out prompts, 120 steps).
    config.flow_alignment.flow.mu = 2000.0
    return config.lock()
