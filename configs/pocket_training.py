"""The experiments of `lvlm pocket-training`: CAPL against its parts, SFT and DPO, and flow alignment.

Any field may be set on the command line, as in `--config.preference.optimizer.peak=1e-4`. The recipes begin with the
files of their names in this folder; the settings here were chosen once, for so small a model, and not tuned on the
questions of the test split.
"""

from ml_collections import ConfigDict

from lvlm_jax import config_files


def get_config() -> ConfigDict:
    """Data, gates, and a configuration (`lvlm_jax.training.settings`) for each training."""
    config = ConfigDict()
    config.model = "pocket"
    config.seed = 0  # of prompts, conversations and questions; each of these purposes has its own images

    # The base of the arms: full fine-tuning under CAPL's attention, half of it over several images.
    config.talks = ConfigDict(dict(count=12000, held_out=400, single=0.5, describe=0.2, one_word=0.6))
    config.base = config_files.load_config("sft")
    config.base.sft.method = "capl"
    config.base.lora.enabled = False
    config.base.optimizer.peak = 5e-4
    config.base.update(batch=16, steps=1500, length=512, length_groups=16)
    config.gate = 0.08  # the accuracy that it must lose under truncated attention

    # Nearly every prompt gives a pair, because the ladder finds a wrong answer to it.
    config.pairs = ConfigDict(
        dict(prompts=5000, single=1 / 6, one_word=0.6, max_new_tokens=32, batch=32, max_negation=0.5)
    )
    config.seeds = (0, 1, 2)
    config.ablations = True  # CAPL without its likelihood term (λ = 0)
    config.rounds = 2  # number of rounds in which CAPL's own model answers new prompts and learns from the pairs
    config.sft = config_files.load_config("sft")
    config.preference = config_files.load_config("capl")
    for name in ("sft", "preference"):
        config[name].lora.update(rank=32, alpha=64.0)
        config[name].optimizer.peak = 2e-4
        config[name].update(batch=16, steps=600, length=512, length_groups=16)
    config.questions = 2700  # of the test split, balanced
    config.limit = 0  # only this number of each kind, for a trial; 0: all

    # Flow alignment: prompts about one image. Most of them ask for a description, because SEVI hardly changes other
    # answers. The divergence of answers is about a hundredth of a nat; that of attention, summed over layers and heads,
    # is several nats. At mu = 100 the student's attention came closer to the teacher's, but its answers moved away
    # (0.69 on held-out prompts).
    config.answers = ConfigDict(dict(prompts=800, held_out=150, describe=0.7))
    config.flow_alignment = config_files.load_config("flow_alignment")
    config.flow_alignment.flow.mu = 2000.0
    config.flow_alignment.optimizer.peak = 5e-4
    config.flow_alignment.update(batch=16, steps=300, length=256)
    for name in ("base", "sft", "preference", "flow_alignment"):
        config[name].loop.update(workers=0, evaluate_every=1000, save_every=50)
    return config.lock()
