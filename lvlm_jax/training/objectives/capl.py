"""CAPL (arXiv 2603.07048): DPO's loss under selective cross-image attention, and λ NLL of the chosen answer."""

from lvlm_jax.training import pairwise

OBJECTIVE = pairwise.objective("capl", method="capl", nll=1.0)
