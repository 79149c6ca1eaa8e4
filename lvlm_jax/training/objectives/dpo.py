"""DPO (arXiv 2305.18290), IPO and SLiC's hinge under plain attention; the formulas are in `preference_losses`."""

from lvlm_jax.training import pairwise

OBJECTIVE = pairwise.objective("dpo")
