"""Peak FLOP/s of devices: the one table for plans and for the utilisation of a run."""

# Dense bfloat16 FLOP/s by a part of JAX's `device_kind`; the first match counts. From the makers' data sheets: NVIDIA's
# for each board, and docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} per chip.
PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None when it is not in the table."""
    return next((peak for name, peak in PEAKS if name.lower() in device_kind.lower()), None)
