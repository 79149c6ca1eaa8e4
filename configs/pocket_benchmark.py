"""The settings under which methods are compared on the models of the pocket world: the papers', never tuned there.

Published layers are of a 32-layer decoder. The pocket model has eight, so there they are shares of the depth
(`get_methods`). A model of about their depth, as smol with 30, is asked with the numbers as they are
(`get_published`): layers that a paper counts from the top are shares of the depth, and what is counted in image tokens
is scaled from 576 of an image to 64.
"""

from collections.abc import Mapping

from lvlm_jax import methods

TOKENS = 64 / 576  # of an image: here and where the settings were published


def get_methods() -> dict[str, methods.Method]:
    """Method by the name it has on the command line and in the table."""
    return {
        "cmac-pope": methods.CMAC.preset("llava-1.5/pope"),
        "cmac-chair": methods.CMAC.preset("llava-1.5/chair"),
        "capl": methods.CAPL(),  # acts on several images alone
        "eah": methods.EAH(beta=0.002 / TOKENS),  # its threshold is a share of one of 576 tokens
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


def get_published() -> dict[str, methods.Method | Mapping[str, methods.Method]]:
    """As `get_methods`, with published numbers of layers; a method by parts is asked in those parts alone.

    A method has several where papers have settings for each, and none where it cannot act: on one image, or on answers
    of one word.
    """

    def descriptions(one: methods.Method, else_: methods.Method) -> dict[str, methods.Method]:
        return {"pope": else_, "chair": one, "mme": else_, "multi_image": else_}

    return {
        "cmac": descriptions(methods.CMAC.preset("llava-1.5/chair"), methods.CMAC.preset("llava-1.5/pope")),
        "eah": methods.EAH(beta=0.002 / TOKENS),
        "sevi-balanced": methods.SEVI.preset("balanced"),
        "sevi-focused": methods.SEVI.preset("focused"),
        "clva": methods.CLVA(),  # a reconstruction
        "vcd": methods.VCD(),
        "icd": methods.ICD(),
        "pai": methods.PAI(),
        "m3id": methods.M3ID(),
        "sid": descriptions(methods.SID(keep=round(50 * TOKENS)), methods.SID(keep=round(100 * TOKENS))),
        "vaf": methods.VAF(),
        "middle-layers": methods.MiddleLayers(),
        "dola-low": methods.DoLa(layers="low"),
        "deco": methods.DeCo(start_layer=20, end_layer=29),
        "vista": descriptions(methods.VISTA(lambda_=0.17), methods.VISTA(lambda_=0.01)),
        "nolan": methods.NoLan(),
        "avisc": methods.AvisC(),
        "damro": methods.DAMRO(tokens=round(10 * TOKENS)),
        "ritual": methods.RITUAL(),
        "only": descriptions(methods.ONLY.preset("chair"), methods.ONLY.preset("pope")),
        "memvr": descriptions(methods.MemVR.preset("chair"), methods.MemVR()),
        "var": methods.VAR(),
        "spin": methods.SPIN(),
        "vhr": methods.VHR(),
        "farsight": methods.FarSight(),
        "sparc": {"chair": methods.SPARC()},
        "iat": {"chair": methods.IAT()},
        "capl": {"multi_image": methods.CAPL()},
        "dab": {"multi_image": methods.DAB()},
        "opera": {"chair": methods.OPERA.preset("code")},
    }


def get_claims() -> dict[str, tuple[str, ...]]:
    """Figures that are better with a method, says its paper: names of `lvlm_jax.pocket.claims.FIGURES`.

    By the first word of a method's name. DoLa's paper is about facts in text alone, so it claims nothing here.
    """
    yes_no, described = ("POPE accuracy", "POPE F1"), ("C_S", "C_I")
    both = (*yes_no, *described)
    return {
        "cmac": both,
        "eah": ("POPE F1", *described),
        "sevi": described,
        "clva": both,
        "vcd": both,
        "icd": yes_no,
        "pai": ("POPE F1", *described),
        "m3id": both,
        "sid": both,
        "vaf": yes_no,
        "middle": described,
        "deco": ("POPE F1", *described),
        "vista": ("POPE F1", *described),
        "nolan": yes_no,
        "avisc": both,
        "damro": both,
        "ritual": both,
        "only": both,
        "memvr": both,
        "var": both,
        "spin": both,
        "vhr": described,
        "farsight": both,
        "sparc": ("caption F1",),
        "iat": described,
        "capl": ("several images",),
        "dab": ("several images",),
        "opera": described,
    }
