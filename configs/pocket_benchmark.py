"""The settings under which methods are compared on the models of the pocket world: the papers', never tuned there.

Published layers are of a 32-layer decoder. The pocket model has eight, so there they are shares of the depth; a model
of about their depth, as smol with 30, is asked with the numbers as they are.
"""

from lvlm_jax import methods

# The methods whose published layers are numbers.
_PUBLISHED = {
    "sevi-balanced": methods.SEVI.preset("balanced"),
    "sevi-focused": methods.SEVI.preset("focused"),
    "pai": methods.PAI(),
    "vaf": methods.VAF(),
    "middle-layers": methods.MiddleLayers(),
    "deco": methods.DeCo(start_layer=20, end_layer=29),
}


def get_methods(published_layers: bool = False) -> dict[str, methods.Method]:
    """Method by the name it has on the command line and in the table.

    Args:
        published_layers: the papers' own numbers of layers, for a model of about their depth.
    """
    shares = {
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
    return shares | _PUBLISHED if published_layers else shares
