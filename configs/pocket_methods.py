"""The settings under which methods are compared on the pocket model: the papers', layers as shares of the depth.

Published layers are of a 32-layer decoder; the pocket model has eight.
"""

from lvlm_jax import methods


def get_methods() -> dict[str, methods.Method]:
    """Method by the name it has in the table."""
    return {
        "CMAC (pope)": methods.CMAC.preset("llava-1.5/pope"),
        "CMAC (chair)": methods.CMAC.preset("llava-1.5/chair"),
        "EAH": methods.EAH(beta=0.002 * 576 / 64),  # its threshold is a share of one of 576 tokens
        "SEVI balanced": methods.SEVI(omega=0.5, start_layer=8 / 32),
        "SEVI focused": methods.SEVI(omega=4.0, start_layer=4 / 32),
        "CLVA (reconstruction)": methods.CLVA(),
        "VCD": methods.VCD(),
        "ICD": methods.ICD(),
        "PAI": methods.PAI(start_layer=2 / 32),
        "M3ID": methods.M3ID(),
        "SID": methods.SID(keep=11),  # of 64 tokens, as 100 of 576
        "VAF": methods.VAF(start_layer=9 / 32, end_layer=15 / 32),
        "Middle layers": methods.MiddleLayers(start_layer=5 / 32, end_layer=19 / 32),
        "DoLa low": methods.DoLa(layers="low"),
        "DeCo": methods.DeCo(),
        "VISTA": methods.VISTA(),
    }
