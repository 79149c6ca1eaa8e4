"""The pocket model from scratch: `lvlm train --config pocket --workdir runs/pocket`.

Any field may be set on the command line, as in `--config.everything.steps=500`.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """Sizes, stages and optimizer of the shipped model."""
    config = ConfigDict()
    config.recipe = "pocket"
    config.seed = 0
    config.stages = ("tower", "connector", "everything")
    config.steps = 0  # steps of every stage, for a trial; 0: each stage's own
    config.start = ""  # a pocket checkpoint to start from; empty: new parameters
    config.export = ""  # folder of the Hugging Face checkpoint; empty: `export` in the work folder
    config.loop = ConfigDict()
    config.loop.workers = 1  # processes that draw scenes ahead of time
    config.loop.log_every = 20
    config.loop.evaluate_every = 250
    config.loop.save_every = 100
    config.loop.keep = 2  # checkpoints of each stage
    config.evaluation_rows = 128  # held-out questions of each kind

    config.model = ConfigDict()
    config.model.vision_feature_layer = -1
    config.model.text = ConfigDict(
        dict(
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=1024,
        )
    )
    config.model.vision = ConfigDict(
        dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6)
    )

    adamw = dict(peak=2e-3, final=0.02, warmup=100, clip=1.0, beta1=0.9, beta2=0.98, weight_decay=0.05)
    config.tower = ConfigDict(dict(adamw, steps=3600, batch=64, peak=1.5e-3))
    config.connector = ConfigDict(dict(adamw, steps=800, batch=64, warmup=30, peak=1.5e-3))
    config.everything = ConfigDict(dict(adamw, steps=2600, warmup=60, patch_weight=0.5))
    # At the full rate, this stage's small batches would undo half of what the first two taught the tower.
    config.everything.rates = ConfigDict(dict(vision_tower=0.2))
    config.everything.drill = 7  # number of single rows that ask only whether, which and where objects are
    # Share of absent objects that are typical of the place; None: none. With None the model expects typical objects, as
    # models trained on the web do, and POPE's adversarial questions tempt it.
    config.everything.hard = config_dict.placeholder(float)
    config.everything.method = "none"  # method whose attention the model is trained with, as for --method, such as capl
    # Two rectangles per step: conversations about one image, and about two to four.
    config.everything.single = ConfigDict(dict(rows=14, length=256, images=14))
    config.everything.several = ConfigDict(dict(rows=1, length=384, images=4))
    return config
