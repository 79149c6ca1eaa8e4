"""Hallucination-mitigation methods: one file each, every one a value."""

from lvlm_jax.methods.base import Method, Readout, Strength, get, names, register, strength, switch
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.methods.chain import chain
from lvlm_jax.methods.clva import CLVA
from lvlm_jax.methods.cmac import CMAC
from lvlm_jax.methods.deco import DeCo
from lvlm_jax.methods.dola import DoLa
from lvlm_jax.methods.eah import EAH
from lvlm_jax.methods.icd import ICD
from lvlm_jax.methods.m3id import M3ID
from lvlm_jax.methods.middle_layers import MiddleLayers
from lvlm_jax.methods.opera import OPERA
from lvlm_jax.methods.pai import PAI
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.methods.sid import SID
from lvlm_jax.methods.vaf import VAF
from lvlm_jax.methods.vcd import VCD
from lvlm_jax.methods.vista import VISTA

__all__ = [
    "CAPL",
    "CLVA",
    "CMAC",
    "EAH",
    "ICD",
    "M3ID",
    "OPERA",
    "PAI",
    "SEVI",
    "SID",
    "VAF",
    "VCD",
    "VISTA",
    "DeCo",
    "DoLa",
    "Method",
    "MiddleLayers",
    "Readout",
    "Strength",
    "chain",
    "get",
    "names",
    "register",
    "strength",
    "switch",
]
