"""The settings under which methods are compared on the pocket model: the papers', layers as shares of the depth.

Published layers are of a 32-layer decoder; the pocket model has eight. Chosen once, not tuned on the pocket world.
"""

from lvlm_jax import methods


def get_methods() -> dict[str, methods.Method]:
    """Method by the name it has on the command line and in the table."""
    return {
        "cmac-pope": methods.CMAC.preset("llava-1.5/pope"),
        "cmac-chair": methods.CMAC.preset("llava-1.5/chair"),
        "capl": methods.CAPL(),  # acts on several images alone
        "eah": methods.EAH(beta=0.002 * 576 / 64),  # its threshold is a share of one of 576 tokens
        "sevi-balanced": methods.SEVI(omega=0.5, start_layer=8 / 32),
        "sevi-focused": methods.SEVI(omega=4.0, start_layer=4 / 32),
        "clva": methods.CLVA(),  # a reconstruction
        "vcd": methods.VCD(),
        "icd": methods.ICD(),
        "pai": methods.PAI(start_layer=2 / 32),
        "m3id": methods.M3ID(),
        "sid": methods.SID(keep=11),  # of 64 tokens, as 100 of 576
        "vaf": methods.VAF(start_layer=9 / 32, end_layer=15 / 32),
        "middle-layers": methods.MiddleLayers(start_layer=5 / 32, end_layer=19 / 32),
        "dola-low": methods.DoLa(layers="low"),
        "deco": methods.DeCo(),
        "vista": methods.VISTA(),
        "opera": methods.OPERA.preset("code"),
    }
