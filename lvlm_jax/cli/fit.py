"""Fit the arrays that some methods need, on pairs of a good and a bad answer, and write them to one file.

    lvlm fit vti --pairs pairs.jsonl --model llava-1.5-7b-hf --out vti.safetensors
    lvlm fit adhh --pocket 60 --out runs/adhh.safetensors
    lvlm fit nullu --pairs pairs.jsonl --model llava-1.5-7b-hf --out nullu.safetensors --export edited/
    lvlm infer --model llava-1.5-7b-hf --method vti --fitted vti.safetensors --image a.jpg --prompt "What is this?"

vti      directions of the feed-forward blocks' outputs, in the decoder and in the vision tower (--lambda-image); the
         authors take 50 to 70 pairs of captions
adhh     heads that favour hallucinated answers: one gradient proposes them, ablation selects them
adaiat   attention of heads to the generated text, at real and at hallucinated object tokens
nullu    directions of hallucination; --export writes a checkpoint that needs no method and that any software loads

Pairs are JSON lines {images, prompt, good, bad}, or preference pairs in any format that lvlm train reads. The file
names its method, checkpoint, pairs and settings, and is refused for another model. A stopped fit resumes when it is
started again.
"""

from pathlib import Path

from lvlm_jax import LVLM, files, fitting
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.fitting.export import export
from lvlm_jax.methods.nullu import Nullu
from lvlm_jax.pocket.pairs import write_pairs
from lvlm_jax.weights import names


def build_parser() -> common.Parser:
    """The flags."""
    parser = common.Parser(prog="lvlm fit", description=__doc__)
    add = parser.add_argument
    add("method", choices=tuple(fitting.FITTERS), help="the method")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, metavar="FILE", help="pairs of a good and a bad answer")
    source.add_argument("--pocket", type=common.number(int, 1), metavar="N",
                        help="draw this many pairs of captions from the pocket world")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    add(
        "--model-path", "--model", metavar="PATH", default="pocket", help="checkpoint folder or hub id (default pocket)"
    )
    add("--dtype", default="auto", choices=names.NUMBER_TYPES, help="auto: float32 on a CPU, else bfloat16")
    add("--batch-size", type=common.number(int, 1), default=4, metavar="N", help="pairs at once (default 4)")
    add("--limit", type=common.number(int, 1), metavar="N", help="only the first pairs of the file")
    add("--seed", type=common.number(int, 0), default=0, metavar="N",
        help="seed of --pocket and of vti's masks (default 0)")  # fmt: skip
    add("--export", type=Path, metavar="FOLDER", help="nullu: also write the edited checkpoint")
    return parser


def main(words: list[str]) -> int:
    """Runs the fit, and prints where the file is."""
    flags = build_parser().parse_args(words)
    if flags.export and flags.method != "nullu":
        raise LVLMError(f"--export writes Nullu's edit into a checkpoint; leave it out for {flags.method}")
    pairs = flags.pairs or write_pairs(Path(f"{flags.out}.pairs"), flags.pocket, flags.seed)
    model = LVLM.from_pretrained(flags.model_path, dtype=flags.dtype)
    pairs, out = files.expand(pairs), files.expand(flags.out)
    job = fitting.Job(flags.method, pairs, out, flags.batch_size, flags.limit, flags.seed)
    arrays = fitting.fit(model, job)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in sorted(arrays.arrays.items()))
    print(f"{job.out}: {shapes}")
    if flags.export:
        print(f"edited checkpoint in {export(model, Nullu(fitted=arrays), flags.export)}")
    return 0
