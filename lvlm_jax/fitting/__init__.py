"""What methods need measured on pairs of answers first: directions, heads, statistics; one command, one kind of file.

Each fitter is a `Fitter`: what it takes of a batch of pairs, and what becomes of that in the end.
"""

from lvlm_jax.fitting.run import FITTERS, Job, fit

__all__ = ["FITTERS", "Job", "fit"]
