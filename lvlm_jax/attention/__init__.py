"""The attention function, the stages that a method may override, rotary positions, and key/value caches."""

from lvlm_jax.attention.attend import attend
from lvlm_jax.attention.cache import Block, LayerCache
from lvlm_jax.attention.context import Context
from lvlm_jax.attention.tap import Tap, Tapped
from lvlm_jax.attention.transform import Chain, Site, Transform

__all__ = ["Block", "Chain", "Context", "LayerCache", "Site", "Tap", "Tapped", "Transform", "attend"]
