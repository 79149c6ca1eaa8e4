"""The key table of Qwen2.5-VL: that of Qwen2-VL with gated MLPs in the tower."""

from lvlm_jax.weights.qwen2_vl import table

TABLE = table(("gate_proj", "up_proj", "down_proj"))
