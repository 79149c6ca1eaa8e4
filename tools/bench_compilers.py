"""Memory of programs according to the compilers of TPUs and GPUs, without such devices.

    python tools/bench_compilers.py --compiler cuda --lengths 624,4096 --methods none,capl --batches 1,8
    python tools/bench_compilers.py --compiler tpu --program update --mesh 1,1,8 --lengths 4096
    python tools/bench_compilers.py --compiler tpu --program decode --model qwen2-7b --mesh 2,1,4 --batches 1,2
    python tools/bench_compilers.py --compiler tpu --program tower

The model has LLaVA-1.5-7B's or Qwen2-7B's shapes cut to two layers, bfloat16; prompts have as many images as fit.
Prints a table of GiB of temporary memory and the compiler's CPU seconds: of a prefill (one row for each method and
batch), of an update by DPO with adapters and recomputed layers, of Qwen2.5-VL-7B's tower, or of a token of greedy
decoding with its messages between devices.
"""

import functools
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax import methods, models
from lvlm_jax.cli import common
from lvlm_jax.generation import decode_loop
from lvlm_jax.generation.sampling import Sampling, sample_keys
from lvlm_jax.generation.state import Prompt
from lvlm_jax.methods import Method
from lvlm_jax.parallel import cache_sharding, make_mesh
from lvlm_jax.planning import collectives, compilers, hlo, inference, plan, training
from lvlm_jax.planning.sizes import SIZES
from lvlm_jax.processors.layout import bucket

LAYERS, IMAGE, TEXT = 2, 576, 48
PROGRAMS = ("prefill", "update", "decode", "tower")
# Published settings, but in layers that a model of two layers has.
METHODS = {
    "none": lambda: None,
    "cmac": lambda: methods.CMAC(),
    "eah": lambda: methods.EAH(),
    "capl": lambda: methods.CAPL(layers=(0, 1)),
    "sid": lambda: methods.SID(start_layer=1),
    "vcd": lambda: methods.VCD(),
}


MODELS = {
    "llava-1.5-7b": SIZES["llava-1.5-7b"],
    "qwen2-7b": SIZES["llava-onevision-72b"]
    | {"text_config": dict(
        model_type="qwen2", hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064,
    )},
}  # fmt: skip
# Qwen2.5-VL-7B with four layers in its tower, of which two attend to whole images.
TOWER = dict(
    model_type="qwen2_5_vl", image_token_id=151655, video_token_id=151656, hidden_size=3584, intermediate_size=18944,
    num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=LAYERS, vocab_size=152064,
    rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    vision_config=dict(
        depth=4, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[1, 3],
    ),
)  # fmt: skip
PICTURES = {"one of 3584 x 3584": [(3584, 3584)], "16 of 1024 x 1024": [(1024, 1024)] * 16}


@functools.cache
def cut(layers: int = LAYERS, model: str = "llava-1.5-7b") -> models.FamilyConfig:
    """A model of MODELS with `layers` decoder layers and a context of 2^17 tokens."""
    published = MODELS[model]
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


def decode(
    compiler: str, sizes: tuple[int, int, int], config: models.FamilyConfig, batch: int = 1
) -> jax.stages.Compiled:
    """The greedy decode loop after `batch` prompts of 624 tokens, on a mesh of the given sizes."""
    mesh = make_mesh(*sizes, devices=compilers.absent_devices(compiler)[: np.prod(sizes)])
    params = inference.parameters(config, "bfloat16", mesh)
    columns, room = bucket(624), bucket(128)
    prompt = Prompt(
        jax.ShapeDtypeStruct((batch, columns, config.text.hidden_size), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, columns), jnp.int32),
    )

    def begun(params: dict, prompt: Prompt) -> decode_loop.Answers:
        state, step = decode_loop.prefill(params, config, prompt, None, tail_rows=64, capacity=columns + room)
        stop, tokens = jnp.zeros((1,), jnp.int32), jnp.zeros((batch, columns), jnp.int32)
        return decode_loop.choose_first(state, step.combined, tokens, Sampling.of(), sample_keys(0, batch), stop, room)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        place = cache_sharding(mesh, leaf.shape) if leaf.ndim == 4 else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    answers = jax.tree.map(placed, jax.eval_shape(begun, params, prompt))
    traced = decode_loop.run.trace(params, config, answers, jax.ShapeDtypeStruct((), jnp.int32))
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def tower(compiler: str, config: models.FamilyConfig, pictures: list[tuple[int, int]]) -> jax.stages.Compiled:
    """The compiled tower, which takes patches, for images of the given (height, width) in pixels."""
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


def update(
    compiler: str,
    length: int,
    layers: int = LAYERS,
    recipe: str = "dpo",
    sizes: tuple[int, int, int] = (1, 1, 1),
    batch: int = 1,
) -> jax.stages.Compiled:
    """One update of adapters by `batch` pairs, whose rows have `length` tokens; layers are rematerialized."""
    config = cut(layers)
    job = plan.Job(
        "7b", config, batch=batch, images=max(1, (length - 192) // IMAGE), prompt_tokens=length - 128, new_tokens=128,
        training=plan.Training(recipe, remat=True),
    )  # fmt: skip
    mesh = make_mesh(*sizes, devices=compilers.absent_devices(compiler)[: np.prod(sizes)])
    traced = training.traced_update(job, config, mesh)[0]
    return traced.lower().compile(compiler_options=dict(compilers.options(compiler)))


def temporary(program: jax.stages.Compiled) -> float:
    """GiB of temporary memory of a program."""
    return program.memory_analysis().temp_size_in_bytes / 2**30


def figures(compile_one: Callable[[], jax.stages.Compiled]) -> str:
    """GiB of temporary memory and the compiler's CPU seconds, or what the compiler said of a program that is too large.

    The compiler of TPUs gives no program that needs more than the device's memory.
    """
    start = time.process_time()
    try:
        result = f"{temporary(compile_one()):.2f}"
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"Used ([\d.]+[KMG]) of ([\d.]+[KMG])", str(error))
        if needed is None:
            raise
        result = f"{needed[1]} needed, {needed[2]} there"
    return f"{result} ({time.process_time() - start:.0f} s)"


def messages(program: jax.stages.Compiled, devices: int) -> str:
    """In words, the messages between devices for one token of a decode loop, and the loop's memory."""
    computations, entry = hlo.of(program)
    times = hlo.runs(computations, hlo.round_of(computations, entry))
    sent = collectives.read(computations, times, devices)
    memory = program.memory_analysis()
    return (
        f"{sent.count:.0f} messages, {sum(sent.received.values()) / 1e6:.3f} MB received, temporary "
        f"{memory.temp_size_in_bytes / 2**20:.1f} MiB, arguments {memory.argument_size_in_bytes / 2**20:.1f} MiB"
    )


def main(words: list[str]) -> int:
    """Print the table."""
    parser = common.Parser(prog="tools/bench_compilers.py", description=__doc__)
    parser.add_argument("--compiler", choices=compilers.NAMES, default="cuda", help="the platform (default cuda)")
    parser.add_argument(
        "--program", choices=PROGRAMS, default=PROGRAMS[0], help=f"what to compile (default {PROGRAMS[0]})"
    )
    parser.add_argument("--model", choices=MODELS, default="llava-1.5-7b", help="of a token (default llava-1.5-7b)")
    parser.add_argument(
        "--layers", type=common.number(int, 1), default=LAYERS, help=f"of the text model (default {LAYERS})"
    )
    for name, default, what in (
        ("lengths", "624,4096,16384,32768", "tokens of a prompt, or of a row of an update,"),
        ("batches", "1", "conversations, or pairs of an update,"),
        ("methods", ",".join(METHODS), "of a prefill,"),
        ("mesh", "1,1,1", "data, fsdp and tensor of updates and tokens,"),
    ):
        parser.add_argument(f"--{name}", default=default, help=f"{what} separated by commas (default {default})")
    flags = parser.parse_args(words)
    lengths, batches, mesh = (
        tuple(int(one) for one in text.split(",")) for text in (flags.lengths, flags.batches, flags.mesh)
    )
    rows: dict[str, list[Callable[[], str]]] = {}
    for batch in batches:
        if flags.program == "prefill":
            for name in flags.methods.split(","):
                rows[f"{name}, batch {batch}"] = [
                    partial(figures, partial(compiled, flags.compiler, length, batch, METHODS[name](), flags.layers))
                    for length in lengths
                ]
        elif flags.program == "update":
            rows[f"{flags.layers} layers, batch {batch}"] = [
                partial(figures, partial(update, flags.compiler, length, flags.layers, "dpo", mesh, batch))
                for length in lengths
            ]
        elif flags.program == "decode":
            program = partial(decode, flags.compiler, mesh, cut(flags.layers, flags.model), batch)
            rows[f"{flags.model}, batch {batch}"] = [lambda program=program: messages(program(), math.prod(mesh))]
    heads = lengths
    if flags.program == "decode":
        heads = (f"mesh {flags.mesh}",)
    if flags.program == "tower":
        config, heads = models.config_from_hf(TOWER), PICTURES
        rows["Qwen2.5-VL-7B"] = [
            partial(figures, partial(tower, flags.compiler, config, pictures)) for pictures in PICTURES.values()
        ]
    print(f"| {compilers.label(flags.compiler)}, jax {jax.__version__} | " + " | ".join(map(str, heads)) + " |")
    print("|---" * (1 + len(heads)) + "|", flush=True)
    for name, cells in rows.items():
        print(f"| {name} |", end="", flush=True)
        for cell in cells:
            print(f" {cell()} |", end="", flush=True)
        print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
