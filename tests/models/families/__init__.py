"""Every family with a tiny random model of it."""

from tests.models.families.gemma3 import GEMMA3
from tests.models.families.instructblip import INSTRUCTBLIP
from tests.models.families.internvl import INTERNVL
from tests.models.families.llava import LLAVA
from tests.models.families.patches import GLM4V, QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from tests.models.families.qwen_vl import QWEN_VL
from tests.models.families.smolvlm import IDEFICS3, SMOLVLM
from tests.models.families.tiled import LLAVA_NEXT, LLAVA_ONEVISION

ALL = (GEMMA3, GLM4V, IDEFICS3, INSTRUCTBLIP, INTERNVL, LLAVA, LLAVA_NEXT, LLAVA_ONEVISION)
ALL += (QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN_VL, SMOLVLM)
FAMILIES = {family.name: family for family in ALL}
