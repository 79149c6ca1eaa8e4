"""Analyses of attention, hidden states and masks: where a model looks.

Pure functions on arrays, and an HTML page that shows their results. Start with `words` and `maps`; `overlay` and
`figures` draw them.
"""

from lvlm_jax.analysis.flow import Flow, HideImages, divergence, information_flow, masking_probe
from lvlm_jax.analysis.heads import Drift, drift_curve, sink_density
from lvlm_jax.analysis.maps import image_mass, patch_maps, token_places, word_maps
from lvlm_jax.analysis.readers import follow, head_sinks, mean_attention, with_answer
from lvlm_jax.analysis.words import Word, words_of

__all__ = [
    "Drift",
    "Flow",
    "HideImages",
    "Word",
    "divergence",
    "drift_curve",
    "follow",
    "head_sinks",
    "image_mass",
    "information_flow",
    "masking_probe",
    "mean_attention",
    "patch_maps",
    "sink_density",
    "token_places",
    "with_answer",
    "word_maps",
    "words_of",
]
