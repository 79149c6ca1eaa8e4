"""Defaults of `lvlm infer`; each of them is also a flag.

To change them, copy this file and pass the copy with `--config`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Settings of `lvlm infer`; flags on the command line take precedence."""
    config = ml_collections.ConfigDict()

    config.model_path = "pocket"  # the model inside the package, a checkpoint folder, or a hub id
    config.dtype = "auto"  # dtype of weights and cache: float32, bfloat16, or auto (float32 on a CPU, else bfloat16)
    config.quant = "none"  # int8: the decoder's weights as 8-bit integers, half to a quarter of the memory

    config.allow_urls = False  # download images that are http or https addresses
    config.system = "none"  # system prompt: a text, or vicuna for Vicuna's sentence

    config.method = "none"  # see `lvlm infer --help` for the names; the method's own settings are flags
    config.compare = True  # with a method: also answer without it, for comparison (not in a job)

    config.temperature = 0.0  # 0 takes the most probable token, 1 samples from the model's distribution
    config.top_p = 1.0  # sample from the fewest tokens that reach this share of the probability
    config.top_k = 0  # sample from this many most probable tokens; 0: from all
    config.repetition_penalty = 1.0  # above 1: tokens seen before become less likely
    config.generation_config = "plain"  # checkpoint: the checkpoint's own settings, such as a penalty
    config.max_new_tokens = 256  # longest answer
    config.seed = 0  # seed of sampling; the same seed gives the same answers

    config.image_folder = "."  # folder of the images of a question file
    config.batch_size = 8  # batch size of a job
    config.schedule = "auto"  # how a job fills its batches: continuous, batches, or auto (see docs/batching.md)

    # The demo, `lvlm infer` without arguments.
    config.demo = demo = ml_collections.ConfigDict()
    demo.method = "vcd"
    demo.prompts = ("Describe the image.", "Is there a fork in the image?", "Is there a dog in the image?")
    # Printed below the answers of pocket. The figures are those of docs/pocket_benchmark.md.
    demo.note = (
        "One image proves nothing. In 200 descriptions of such images VCD named an object that is not there in 25.0 %\n"
        "(greedy 49.0 %) and named 64.3 % of the objects that are there (greedy 75.7 %); greedy descriptions cut to\n"
        "the same length did better still. lvlm evaluate --controls makes such comparisons."
    )
    demo.attention_map = "runs/demo.png"
    # With smol installed, the demo uses smol, and shows a description that the method fixes and one that it breaks.
    # Image i of the benchmark is scene i // 3 of seed i % 3. These are the images 11 and 31, chosen among those that
    # are fixed and broken in float32 too, in which the demo runs. Counts (images=0: no examples) are of bfloat16:
    #   lvlm pocket-benchmark --model smol --dtype bfloat16 --images 36 --captions 90 --batch-size 32
    #       --parts pope chair multi_image
    demo.examples = ml_collections.ConfigDict(dict(method="vcd", images=90, folder="runs"))
    demo.examples.mended = dict(count=14, scene=3, seed=2)
    demo.examples.spoilt = dict(count=7, scene=10, seed=1)

    return config
