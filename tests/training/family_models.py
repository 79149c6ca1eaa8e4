"""Tiny random models of all families with processors beside them, for tests of training."""

from lvlm_jax import LVLM
from tests.models.families import FAMILIES
from tests.models.families.qwen_vl import QWEN_VL
from tests.processors import test_qwen_vl as qwen_vl


def _qwen_vl(folder):
    QWEN_VL.build(folder, 4, **qwen_vl.TOKENS)
    qwen_vl.write_files(folder)
    return LVLM.from_pretrained(folder)


# Family -> maker of its model, in a folder.
MAKERS = {name: family.with_processor for name, family in FAMILIES.items() if name != "llava"}
MAKERS["qwen_vl"] = _qwen_vl
