"""Fits what methods need, on pairs of answers: directions, heads, statistics; one command and one file format.

Each fitter is a `Fitter`: it collects arrays from batches of pairs, and computes the fitted arrays from them.
"""

from lvlm_jax.fitting.run import FITTERS, Job, fit

__all__ = ["FITTERS", "Job", "fit"]
