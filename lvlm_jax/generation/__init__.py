"""Prefill, decode loops, branches, sampling, searches, continuous batching, sweeps and jobs."""
