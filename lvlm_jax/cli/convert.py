"""Convert a checkpoint with any naming scheme and weight format into a Hugging Face safetensors folder.

  lvlm convert llava-hf/llava-1.5-7b-hf out/llava-7b-bf16 --dtype bfloat16
  lvlm convert liuhaotian/llava-v1.5-7b out/llava-7b --vision-tower openai/clip-vit-large-patch14-336 \\
      --processor llava-hf/llava-1.5-7b-hf
  lvlm convert llava-hf/llava-1.5-7b-hf out/llava-7b-tuned --adapter runs/capl/adapter
"""

from lvlm_jax.cli import common
from lvlm_jax.weights.convert import convert


def main(arguments: list[str]) -> int:
    """Reads the checkpoint, writes the converted one, and prints its size."""
    parser = common.Parser(prog="lvlm convert", description=__doc__)
    parser.add_argument("source", help="checkpoint folder or hub id")
    parser.add_argument("target", help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the tensors; default: each keeps its own"
    )
    parser.add_argument(
        "--scheme",
        choices=("hub", "transformers", "state_dict", "state_dict_4"),
        default="hub",
        help="tensor names to write: hub as llava-hf (default), transformers as files of version 5, state_dict and "
        "state_dict_4 as in memory in transformers 5 and 4",
    )
    parser.add_argument(
        "--vision-tower", metavar="PATH", help="CLIP folder or hub id, for an original checkpoint without a tower"
    )
    parser.add_argument(
        "--processor", metavar="PATH", help="folder or hub id of tokenizer and processor; default: the source"
    )
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="PEFT LoRA adapter (folder or hub id) to merge into the weights"
    )
    parser.add_argument(
        "--max-shard-size",
        type=common.number(float, above=0, high=1e9),
        default=5.0,
        help="size of the largest file in GB; default 5",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the target if it has a checkpoint")
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
