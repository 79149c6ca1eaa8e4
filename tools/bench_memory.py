"""Measures the memory of a process that answers, against the size of the model's weights.

    python tools/bench_memory.py --dtype bfloat16 --sizes 0.5b,1b

Each size runs in its own process, which makes random weights, answers one prompt with an image twice, and reports its
largest resident size meanwhile. Python, libraries and programs take the same memory in both processes, so the slope
between the two sizes is the memory per byte of weights.
"""

import argparse
import json
import multiprocessing
import re
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def answer(size: str, dtype: str, new_tokens: int) -> dict:
    """Bytes of the weights, and the largest resident size of this process while it answers."""
    import bench_parts
    import jax

    from lvlm_jax import LVLM

    params, config = bench_parts.model_of(size, dtype)
    jax.block_until_ready(params)
    inputs, _ = bench_parts.random_prompt(config, 1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
    model = LVLM(params, config)
    for _ in range(2):
        model.generate(inputs, max_new_tokens=new_tokens, stop_token_ids=())
    status = Path("/proc/self/status").read_text()
    largest = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
    return {"weights": sum(leaf.nbytes for leaf in jax.tree.leaves(params)), "process": largest}


def main() -> None:
    """Prints JSON: the bytes of each size, and the slope."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="0.5b,1b", help="two sizes, the smaller one first (default 0.5b,1b)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and caches (default bfloat16)")
    parser.add_argument("--new-tokens", type=int, default=16, help="length of the answer in tokens (default 16)")
    flags = parser.parse_args()
    results = {}
    for size in flags.sizes.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[size] = pool.apply(answer, (size, flags.dtype, flags.new_tokens))
    small, large = (results[size] for size in flags.sizes.split(","))
    slope = (large["process"] - small["process"]) / (large["weights"] - small["weights"])
    print(json.dumps({"dtype": flags.dtype, **results, "bytes a byte of weights": round(slope, 3)}, indent=1))


if __name__ == "__main__":
    main()
