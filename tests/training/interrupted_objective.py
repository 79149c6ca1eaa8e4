"""Run by `test_kill` in a process of its own: trains an objective on the small checkpoint and exports the result."""

from pathlib import Path

from lvlm_jax.training import finetune
from tests.training import pair_sets

# Names of runs, and the settings that make their losses.
RUNS = {
    "mdpo": dict(recipe="mdpo"),
    "simpo": dict(recipe="simpo"),
    "orpo": dict(recipe="orpo"),
    "kto": dict(recipe="kto"),
    "robust": dict(recipe="dpo", loss="robust", label_smoothing=0.1),
    "mixture under capl": dict(recipe="capl", loss="0.8*sigmoid + 0.2*bco_pair + sft"),
    "learned_method": dict(recipe="learned_method"),
}
STEPS = 160


def train(checkpoint: str, data: str, workdir: Path, name: str) -> None:
    config = pair_sets.config(data, **RUNS[name], model=checkpoint, batch=4, steps=STEPS, validation=data)
    config.loop.update(workers=0, log_every=1, save_every=3, evaluate_every=50)
    if config.lora.enabled:
        config.lora.update(rank=2, dropout=0.1)
    finetune.train(config, workdir)
