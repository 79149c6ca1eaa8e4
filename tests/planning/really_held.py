"""Run by `test_plan` in separate processes: the memory of jobs on one device, measured and planned.

Arguments: how many simulated devices, a work folder, names of CASES. Prints, for each, bytes by program.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

from lvlm_jax import LVLM, methods, parallel
from lvlm_jax.generation import decode_loop
from lvlm_jax.planning import compilers, plan
from lvlm_jax.training import finetune, loop, settings
from tests.training import pair_sets

NEW_TOKENS = {False: 64, True: 16}  # of answers; of learned ones, with which rows have 128 tokens
QUESTION = "What is in the picture?"
PAIR = (QUESTION, 1, "a dog beside a tree", "a cat")

# name -> fields of the `Job` beside those that all have
CASES = {
    "greedy": {},
    "greedy of eight": {"batch": 8},
    "cmac": {"method": methods.CMAC(), "batch": 2},
    "vcd": {"method": methods.VCD(), "batch": 4},
    "int8": {"quant": "int8"},
    "bfloat16": {"dtype": "bfloat16", "batch": 4},
    "sft, all of it": {"batch": 8, "training": plan.Training("sft", lora=False)},
    "sft, recomputed": {"batch": 8, "training": plan.Training("sft", lora=False, remat=True)},
    "sft, in parts": {"batch": 8, "training": plan.Training("sft", lora=False, accumulate=2)},
    "dpo, adapters": {"batch": 8, "training": plan.Training("dpo")},
    "greedy, tensor": {"batch": 8, "mesh": (1, 1, -1)},
    "greedy, data": {"batch": 8, "mesh": (-1, 1, 1)},
    "sft, fsdp": {"batch": 8, "mesh": (1, -1, 1), "training": plan.Training("sft", lora=False)},
    "dpo, fsdp": {"batch": 8, "mesh": (1, -1, 1), "training": plan.Training("dpo")},
}


def bytes_of_first_device(also=()) -> int:
    """Of all arrays that live; a buffer that several arrays share counts once.

    Args:
        also: arrays of the host that a program is given, for which it makes room.
    """
    device, sizes = jax.devices()[0], {}
    for array in jax.live_arrays():
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            array = jax.random.key_data(array)
        for shard in array.addressable_shards:
            if shard.device == device:
                sizes[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(sizes.values()) + sum(leaf.nbytes for leaf in also if isinstance(leaf, np.ndarray))


class Watched:
    """Calls a jitted function and notes what device 0 holds meanwhile, as the most of all calls, by a name."""

    def __init__(self, name, jitted, found):
        self.name, self.jitted, self.found = name, jitted, found

    def __call__(self, *arguments, **options):
        held = bytes_of_first_device(jax.tree.leaves((arguments, options)))
        memory = self.jitted.lower(*arguments, **options).compile().memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.found[self.name] = max(self.found.get(self.name, 0), held + fresh + memory.temp_size_in_bytes)
        return self.jitted(*arguments, **options)


@contextlib.contextmanager
def watched(owner, names, found):
    """Functions of a module watched: {attribute: what to call it}."""
    before = {attribute: getattr(owner, attribute) for attribute in names}
    for attribute, name in names.items():
        setattr(owner, attribute, Watched(name, before[attribute], found))
    try:
        yield
    finally:
        for attribute, jitted in before.items():
            setattr(owner, attribute, jitted)


def answered(job) -> tuple[dict[str, int], int]:
    """Bytes by program while the pocket model answers about pictures, and the tokens of a prompt."""
    mesh = None if job.devices == 1 else parallel.make_mesh(*job.mesh)
    model = LVLM.from_pretrained("pocket", dtype=job.dtype, mesh=mesh, quant=job.quant)
    found, programs = {}, {"encode_images": "images", "embed": "embed", "prefill": "prefill", "run": "decode"}
    parts = [{"type": "image", "image": np.zeros((96, 96, 3), np.uint8)}, {"type": "text", "text": QUESTION}]
    prompt = model.prepare([[{"role": "user", "content": parts}]] * job.batch)
    with watched(decode_loop, programs, found):
        model.generate(prompt, job.method, max_new_tokens=job.new_tokens, stop_token_ids=())
    return found, int(prompt.lengths.max())


def trained(job, workdir) -> dict[str, int]:
    """Bytes of a step while the pocket model learns for two steps."""
    of = job.training
    config = settings.base(of.recipe)
    config.update(dtype=job.dtype, master=of.master, steps=2, batch=job.batch, remat=of.remat)
    config.update(accumulate=of.accumulate, data=str(pair_sets.write(workdir, [PAIR] * job.batch, side=96)))
    config.lora.update(enabled=of.lora, rank=of.rank)
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), job.mesh, strict=True)))
    config.loop.update(workers=0)
    found, make = {}, loop.make_step
    loop.make_step = lambda *given: Watched("step", make(*given), found)
    try:
        finetune.train(config.lock(), workdir / "run")
    finally:
        loop.make_step = make
    return found


def main(devices: int, workdir: Path, cases: list[str]) -> None:
    name, config, folder = plan.read("pocket")
    whole = functools.partial(plan.Job, name, config, devices, folder=folder)
    for case in cases:
        fields = {"mesh": (1, 1, 1), "dtype": "float32"} | CASES[case]
        fields["new_tokens"] = NEW_TOKENS["training" in fields]
        job = whole(**fields)
        if job.training is None:
            real, tokens = answered(job)
            job = job.replaced(prompt_tokens=tokens)
        else:
            (place := workdir / case.replace(" ", "_").replace(",", "")).mkdir()
            real = trained(job, place)
        planned = plan.plan(job, compilers.HERE)
        figures = {"plan": {one.name: one.total for one in planned.programs}, "real": real}
        print(json.dumps({"case": case} | figures), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
