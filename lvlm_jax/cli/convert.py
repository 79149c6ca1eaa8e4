"""Convert a LLaVA checkpoint: any naming scheme and weight format in, a Hugging Face safetensors folder out.

  lvlm convert llava-hf/llava-1.5-7b-hf out/llava-7b-bf16 --dtype bfloat16
  lvlm convert liuhaotian/llava-v1.5-7b out/llava-7b --vision-tower openai/clip-vit-large-patch14-336 \\
      --processor llava-hf/llava-1.5-7b-hf
  lvlm convert llava-hf/llava-1.5-7b-hf out/llava-7b-tuned --adapter runs/capl/adapter
"""

from lvlm_jax.cli import common
from lvlm_jax.weights.convert import convert


def main(arguments: list[str]) -> int:
    """Reads the checkpoint that the arguments name, writes the other one, and says what it wrote."""
    parser = common.Parser(prog="lvlm convert", description=__doc__)
    parser.add_argument("source", help="checkpoint folder or hub id")
    parser.add_argument("target", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: each tensor keeps its own"
    )
    parser.add_argument(
        "--scheme",
        choices=("hub", "transformers", "state_dict", "state_dict_4"),
        default="hub",
        help="tensor names to write: hub as llava-hf does (default), transformers as version 5 writes files, "
        "state_dict and state_dict_4 as transformers 5 and 4 name them in memory",
    )
    parser.add_argument(
        "--vision-tower", help="CLIP folder or hub id, for an original checkpoint that has no tower inside"
    )
    parser.add_argument(
        "--processor", help="folder or hub id to take tokenizer and processor from; default: the source"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="PEFT LoRA adapter (folder or hub id) to merge into the weights"
    )
    parser.add_argument("--max-shard-size", type=common.number(float, above=0), default=5.0, help="in GB; default 5")
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it holds a checkpoint")
    flags = parser.parse_args(arguments)

    folder = convert(
        flags.source,
        flags.target,
        dtype=flags.dtype,
        scheme=flags.scheme,
        vision_tower=flags.vision_tower,
        processor=flags.processor,
        adapter=flags.adapter,
        max_shard_size=int(flags.max_shard_size * 1e9),
        overwrite=flags.overwrite,
    )
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(f"wrote {folder}: {size / 1e9:.3g} GB of weights")
    return 0
