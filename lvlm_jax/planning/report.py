"""Formats plans as text, as JSON records, and as tables."""

from collections.abc import Sequence
from typing import Any

from lvlm_jax.journal.record import method_record
from lvlm_jax.planning.devices import CPU, GIB, Device
from lvlm_jax.planning.plan import Job, Plan


def text(plan: Plan, devices: Sequence[Device]) -> str:
    """One plan: the memory of each program, the work of a device, and which devices suffice."""
    parts = list(plan.largest.parts)
    lines = [
        _title(plan),
        f"figures by {plan.compiler}",
        "",
        "GiB of one device, program by program; the largest must fit:",
        "",
    ]
    lines += _table(
        ["program", *parts, "total"],
        [[one.name, *(_gib(one.parts[part]) for part in parts), _gib(one.total)] for one in plan.programs],
    )
    lines += ["", "work of one device in a run of each program" + ("" if _trains(plan) else " (decode: one token)")]
    lines += ["", *_table(["program", "TFLOP", "GB moved", "GB received", "messages"], _work(plan)), ""]
    if _trains(plan):
        heads = ["device", "GiB", "fits", "s per step", "tokens/s"]
    else:
        heads = ["device", "GiB", "fits", "prefill ms", "ms per token", "tokens/s"]
    lines += [f"at best, on {plan.job.devices} of:", ""]
    lines += _table(heads, [_speed(plan, device) for device in devices])
    return "\n".join(lines) + "\n"


def record(plan: Plan, devices: Sequence[Device]) -> dict[str, Any]:
    """One plan as plain JSON values; bytes and seconds."""
    job, of = plan.job, plan.job.training
    return {
        "model": job.name,
        "parameters": round(plan.parameters),
        "devices": job.devices,
        "mesh": dict(zip(("data", "fsdp", "tensor"), plan.mesh, strict=True)),
        "dtype": job.dtype,
        "quant": job.quant,
        "batch": job.batch,
        "images": job.images,
        "prompt_tokens": job.prompt_tokens,
        "new_tokens": job.new_tokens,
        "compiler": plan.compiler,
        "method": method_record(job.method),
        "training": None if of is None else {**vars(of)},
        "bytes": round(plan.total),
        "largest": plan.largest.name,
        "programs": {
            one.name: {
                "bytes": {part: round(size) for part, size in one.parts.items()},
                "flops": one.flops,
                "moved": round(one.moved),
                "received": {str(reach): round(size) for reach, size in one.received.items()},
                "messages": round(one.count),
            }
            for one in plan.programs
        },
        "on": {device.name: {"fits": device.holds(plan.total), "seconds": plan.seconds(device)} for device in devices},
    }


def table(plans: Sequence[Plan], timed: Device, devices: Sequence[Device]) -> str:
    """A Markdown table with one row per plan of one objective."""
    trains = _trains(plans[0])
    parts = ("parameters", "optimizer", "copy") if trains else ("parameters", "cache")
    speed = [f"s per step, {timed.name}", "tokens/s"] if trains else [
        f"prefill ms, {timed.name}", "ms per token", "tokens/s"
    ]  # fmt: skip
    heads = ["model", "devices", "data x fsdp x tensor", "batch", *parts, "GiB in all", "fits", *speed]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for plan in plans:
        last_parts = plan.programs[-1].parts  # the last program has the cache; the largest may be another
        mesh, fits = " x ".join(map(str, plan.mesh)), [one.name for one in devices if one.holds(plan.total)]
        cells = [plan.job.name, plan.job.devices, mesh, plan.job.batch, *(_gib(last_parts[part]) for part in parts)]
        cells += [f"{_gib(plan.total)} ({plan.largest.name})", ", ".join(fits) or "none"]
        lines.append(f"| {' | '.join(map(str, [*cells, *_speed(plan, timed)[3:]]))} |")
    return "\n".join(lines) + "\n"


def spread(job: Job, devices: int, each: int) -> Job:
    """Distributes a job over `devices` devices for a table: groups of up to eight share a model, or all share its
    training.

    Inference: groups of up to eight devices along `tensor`, the groups along `data`. Training: all along `fsdp`.

    Args:
        each: conversations per group, or rows per device.
    """
    if job.training is not None:
        return job.replaced(devices=devices, mesh=(1, devices, 1), batch=each * devices)
    group = next(size for size in (8, 4, 2, 1) if devices % size == 0 and _divides(job.config.text, size))
    return job.replaced(devices=devices, mesh=(devices // group, 1, group), batch=each * devices // group)


def _divides(text: Any, size: int) -> bool:
    return text.num_heads % size == 0 and text.num_kv_heads % size == 0


def _trains(plan: Plan) -> bool:
    return plan.job.training is not None


def _title(plan: Plan) -> str:
    job, of = plan.job, plan.job.training
    mesh = " x ".join(f"{name} {size}" for name, size in zip(("data", "fsdp", "tensor"), plan.mesh, strict=True))
    facts = [f"{plan.parameters / 1e9:.2f} billion parameters", job.dtype + (f" ({job.quant})" if job.quant else "")]
    facts += [f"{job.devices} devices ({mesh})" if job.devices > 1 else "1 device"]
    if of is None:
        facts += [f"batch {job.batch}", job.method.label if job.method else "greedy"]
    else:
        facts += [f"{of.recipe} with {f'LoRA of rank {of.rank}' if of.lora else f'/{of.train}/ trained'}"]
        facts += [f"batch {job.batch} in {of.accumulate}" + (", recomputing" if of.remat else "")]
    return f"{job.name}: " + ", ".join(facts)


def _work(plan: Plan) -> list[list[str]]:
    return [
        [
            one.name,
            f"{one.flops / 1e12:.3g}",
            f"{one.moved / 1e9:.3g}",
            f"{sum(one.received.values()) / 1e9:.3g}",
            f"{one.count:.0f}",
        ]
        for one in plan.programs
    ]


def _speed(plan: Plan, device: Device) -> list[str]:
    seconds = plan.seconds(device)
    last = seconds.get("step") or seconds["token"]
    times = [f"{last:.3g}"] if _trains(plan) else [f"{seconds['prefill'] * 1e3:.3g}", f"{last * 1e3:.3g}"]
    fits = "yes" if device.holds(plan.total) else "no"
    share = f" (of {device.memory * plan.job.devices / GIB:.0f})" if device.name == CPU else ""
    return [device.name, f"{device.memory / GIB:.3g}{share}", fits, *times, f"{plan.tokens / last:.4g}"]


def _gib(size: float) -> str:
    """Writes bytes as GiB with three digits, or as a whole number from 100 on."""
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 100 else f"{gib:.3g}"


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of text, the first left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    return [
        "  " + "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(
            zip(row, widths, strict=True)))
        for row in (heads, *rows)
    ]  # fmt: skip
