"""Temporary memory of prefill according to the compilers of TPUs and GPUs, without such devices.

    python tools/bench_compilers.py --compiler cuda --lengths 624,4096 --methods none,capl --batches 1,8

The model is LLaVA-1.5-7B cut to two layers, in bfloat16; prompts have as many images of 576 tokens as fit. Prints a
table with one row per method and batch size, and in each cell the GiB of temporary memory and the compiler's seconds.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import methods, models
from lvlm_jax.cli import common
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.parallel import make_mesh
from lvlm_jax.planning import compilers, inference, plan, training
from lvlm_jax.planning.sizes import SIZES
from lvlm_jax.processors.layout import bucket

LAYERS, IMAGE, TEXT = 2, 576, 48
# Published settings, but in layers that a model of two layers has.
METHODS = {
    "none": lambda: None,
    "cmac": lambda: methods.CMAC(),
    "eah": lambda: methods.EAH(),
    "capl": lambda: methods.CAPL(layers=(0, 1)),
    "sid": lambda: methods.SID(start_layer=1),
    "vcd": lambda: methods.VCD(),
}


@functools.cache
def cut(layers: int = LAYERS) -> models.FamilyConfig:
    """LLaVA-1.5-7B with `layers` decoder layers and a context of 2^17 tokens."""
    published = SIZES["llava-1.5-7b"]
    text = published["text_config"] | {"num_hidden_layers": layers, "max_position_embeddings": 2**17}
    return models.config_from_hf(published | {"text_config": text})


def compiled(
    compiler: str, length: int, batch: int, method: Method | None, layers: int = LAYERS
) -> jax.stages.Compiled:
    """Prefill of `batch` prompts of `length` tokens on one device, with cache columns for 128 answer tokens."""
    config = cut(layers)
    mesh = make_mesh(1, 1, 1, compilers.absent_devices(compiler)[:1])
    params = inference.parameters(config, "bfloat16", mesh)
    images, columns = max(1, (length - TEXT) // IMAGE), bucket(length)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    prompt = Prompt(
        jax.ShapeDtypeStruct((batch, columns, config.text.hidden_size), jnp.bfloat16, sharding=everywhere),
        jax.ShapeDtypeStruct((batch, columns), jnp.int32, sharding=everywhere),
    )
    contrast = prompt if method is not None and method.contrast_prompt() == "pixels" else None
    count = 2 ** int(np.ceil(np.log2(images)))
    traced = decode_loop.prefill.trace(
        params, config, prompt, method, tail_rows=64, capacity=columns + 128, contrast=contrast, image_count=count
    )
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def decode(compiler: str, sizes: tuple[int, int, int], config: models.FamilyConfig) -> jax.stages.Compiled:
    """The greedy decode loop after a prompt of 624 tokens, on a mesh of the given sizes."""
    mesh = make_mesh(*sizes, devices=compilers.absent_devices(compiler)[: np.prod(sizes)])
    params = inference.parameters(config, "bfloat16", mesh)
    columns, room = bucket(624), bucket(128)
    prompt = Prompt(
        jax.ShapeDtypeStruct((1, columns, config.text.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, columns), jnp.int32),
    )

    def begun(params: dict, prompt: Prompt) -> decode_loop.Answers:
        state, step = decode_loop.prefill(params, config, prompt, None, tail_rows=64, capacity=columns + room)
        stop, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((1, columns), jnp.int32)
        return decode_loop.choose_first(state, step.combined, tokens, Sampling.of(), sample_keys(0, 1), stop, room)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = (None, "tensor") if leaf.ndim == 4 else ()  # caches by their heads
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    answers = jax.tree.map(placed, jax.eval_shape(begun, params, prompt))
    traced = decode_loop.run.trace(params, config, answers, jax.ShapeDtypeStruct((), jnp.int32))
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def tower(compiler: str, config: models.FamilyConfig, pictures: list[tuple[int, int]]) -> jax.stages.Compiled:
    """A tower that takes patches, for images of the given (height, width) in pixels."""
    side, merge = config.vision.patch_size, config.vision.merge
    unit = side * merge
    sizes = np.array([[1, *(round(length / unit) * merge for length in picture)] for picture in pictures])
    patches = np.broadcast_to(np.float32(0), (int(sizes.prod(axis=1).sum()), config.vision.channels))
    shown = config.pictures([{"pixel_values": patches, "image_grid_thw": sizes}], [])
    mesh = make_mesh(1, 1, 1, compilers.absent_devices(compiler)[:1])
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = inference.parameters(config, "bfloat16", mesh)

    def shape(array: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype), sharding=everywhere)

    traced = decode_loop.encode_images.trace(params, config, *jax.tree.map(shape, (shown.pixels, shown.geometry)))
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def update(compiler: str, length: int, layers: int = LAYERS, recipe: str = "dpo") -> jax.stages.Compiled:
    """One update of adapters on one device by one pair, whose rows have `length` tokens; layers are rematerialized."""
    config = cut(layers)
    job = plan.Job(
        "7b", config, images=max(1, (length - 192) // IMAGE), prompt_tokens=length - 128, new_tokens=128,
        training=plan.Training(recipe, remat=True),
    )  # fmt: skip
    mesh = make_mesh(1, 1, 1, compilers.absent_devices(compiler)[:1])
    traced = training.traced_update(job, config, mesh)[0]
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def temporary(program: jax.stages.Compiled) -> float:
    """GiB of temporary memory."""
    return program.memory_analysis().temp_size_in_bytes / 2**30


def main(words: list[str]) -> int:
    """Print the table."""
    parser = common.Parser(prog="tools/bench_compilers.py", description=__doc__)
    parser.add_argument("--compiler", choices=compilers.NAMES, default="cuda", help="the platform (default cuda)")
    for name, default in (("lengths", "624,4096,16384,32768"), ("batches", "1"), ("methods", ",".join(METHODS))):
        parser.add_argument(f"--{name}", default=default, help=f"separated by commas (default {default})")
    flags = parser.parse_args(words)
    lengths = [int(length) for length in flags.lengths.split(",")]
    print(f"| {flags.compiler}, jax {jax.__version__} | " + " | ".join(map(str, lengths)) + " |")
    print("|---" * (1 + len(lengths)) + "|", flush=True)
    for name in flags.methods.split(","):
        for batch in map(int, flags.batches.split(",")):
            print(f"| {name}, batch {batch} |", end="", flush=True)
            for length in lengths:
                start = time.process_time()
                peak = temporary(compiled(flags.compiler, length, batch, METHODS[name]()))
                print(f" {peak:.2f} ({time.process_time() - start:.0f} s) |", end="", flush=True)
            print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
