"""Run by `test_plan` on eight simulated devices: what the plan gives to each of 1, 2, 4 or 8 devices of one job."""

import json

from lvlm_jax.planning import plan
from tests.planning.resident_growth import config_of

COUNTS = (1, 2, 4, 8)


def main() -> None:
    config = config_of(4)
    for kind, training in (("answer", None), ("learn", plan.Training("sft", lora=False))):
        for count in COUNTS:
            mesh = (1, 1, count) if training is None else (1, count, 1)
            job = plan.Job(kind, config, count, mesh, batch=8, training=training)
            found = plan.plan(job)
            last = found.programs[-1]
            share = {
                part: last.contents[part] for part in ("parameters", "cache", "optimizer") if part in last.contents
            }
            share |= {f"FLOPs of {one.name}": one.flops for one in found.programs if one.flops and one.name != "images"}
            print(json.dumps({"kind": kind, "devices": count, "share": share, "total": found.total}), flush=True)


if __name__ == "__main__":
    main()
