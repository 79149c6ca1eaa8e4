"""The settings under which methods are compared on the models of the pocket world: the papers', never tuned there.

Published layer numbers are for a 32-layer decoder. The pocket model has eight layers, so they become shares of the
depth (`get_methods`). A model of similar depth, such as smol with 30 layers, uses the numbers unchanged
(`get_published`), except that layers counted from the top are shares of the depth, and numbers of image tokens are
scaled from 576 per image to 64.
"""

from lvlm_jax import methods

TOKENS = 64 / 576  # image tokens per image here, relative to the published settings


def get_methods() -> dict[str, methods.Method]:
    """Method by the name it has on the command line and in the table."""
    return {
        "cmac-pope": methods.CMAC.preset("llava-1.5/pope"),
        "cmac-chair": methods.CMAC.preset("llava-1.5/chair"),
        "capl": methods.CAPL(),  # acts only on several images
        "eah": methods.EAH(beta=0.002 / TOKENS),  # its threshold is relative to one of 576 tokens
        "sevi-balanced": methods.SEVI(omega=0.5, start_layer=8 / 32),
        "sevi-focused": methods.SEVI(omega=4.0, start_layer=4 / 32),
        "clva": methods.CLVA(),  # a reconstruction
        "vcd": methods.VCD(),
        "icd": methods.ICD(),
        "pai": methods.PAI(start_layer=2 / 32),
        "m3id": methods.M3ID(),
        "sid": methods.SID(keep=11),  # of 64 tokens, like 100 of 576
        "vaf": methods.VAF(start_layer=9 / 32, end_layer=15 / 32),
        "middle-layers": methods.MiddleLayers(start_layer=5 / 32, end_layer=19 / 32),
        "dola-low": methods.DoLa(layers="low"),
        "deco": methods.DeCo(),
        "vista": methods.VISTA(),
        "opera": methods.OPERA.preset("code"),
        "nolan": methods.NoLan(),
        "avisc": methods.AvisC(),
        "damro": methods.DAMRO(tokens=round(10 * TOKENS)),
        "causalmm": methods.CausalMM(),
        "ritual": methods.RITUAL(),
        "only": methods.ONLY.preset("pope"),
        "memvr": methods.MemVR(start_layer=6 / 32, end_layer=16 / 32),
        "var": methods.VAR(start_layer=2 / 32),
        "spin": methods.SPIN(),
        "vhr": methods.VHR(),
        "sparc": methods.SPARC(selected_layer=20 / 32),
        "iat": methods.IAT(start_layer=5 / 32, end_layer=18 / 32),
        "dab": methods.DAB(),  # acts only on several images
        "farsight": methods.FarSight(),
    }


def get_published() -> dict[str, dict[str, methods.Method]]:
    """Method by row name and part of the benchmark, with published layer numbers.

    Some papers have separate settings for descriptions. Some methods cannot act on one-word answers. The part with
    several images runs CMAC and the methods whose papers are about several images.
    """

    def one_image(asked: methods.Method, described: methods.Method | None = None) -> dict[str, methods.Method]:
        return {"pope": asked, "chair": described or asked, "mme": asked}

    cmac = one_image(methods.CMAC.preset("llava-1.5/pope"), methods.CMAC.preset("llava-1.5/chair"))
    return {
        "cmac": {**cmac, "multi_image": cmac["pope"]},
        "vcd": one_image(methods.VCD()),
        "sevi-focused": one_image(methods.SEVI.preset("focused")),
        "pai": one_image(methods.PAI()),
        "middle-layers": one_image(methods.MiddleLayers()),
        "vista": one_image(methods.VISTA(lambda_=0.01), methods.VISTA(lambda_=0.17)),
        "deco": one_image(methods.DeCo(start_layer=20, end_layer=29)),
        "capl": {"multi_image": methods.CAPL()},
        "dab": {"multi_image": methods.DAB()},
        "eah": one_image(methods.EAH(beta=0.002 / TOKENS)),
        "sevi-balanced": one_image(methods.SEVI.preset("balanced")),
        "clva": one_image(methods.CLVA()),  # a reconstruction
        "icd": one_image(methods.ICD()),
        "m3id": one_image(methods.M3ID()),
        "sid": one_image(methods.SID(keep=round(100 * TOKENS)), methods.SID(keep=round(50 * TOKENS))),
        "vaf": one_image(methods.VAF()),
        "dola-low": one_image(methods.DoLa(layers="low")),
        "nolan": one_image(methods.NoLan()),
        "avisc": one_image(methods.AvisC()),
        "ritual": one_image(methods.RITUAL()),
        "only": one_image(methods.ONLY.preset("pope"), methods.ONLY.preset("chair")),
        "memvr": one_image(methods.MemVR(), methods.MemVR.preset("chair")),
        "vhr": one_image(methods.VHR()),
        "spin": one_image(methods.SPIN()),
        "var": one_image(methods.VAR()),
        "farsight": one_image(methods.FarSight()),
        "damro": one_image(methods.DAMRO(tokens=round(10 * TOKENS))),
        "causalmm": one_image(methods.CausalMM()),
        "sparc": {"chair": methods.SPARC()},
        "iat": {"chair": methods.IAT()},
        "opera": {"chair": methods.OPERA.preset("code")},
    }


def get_claims() -> dict[str, tuple[str, ...]]:
    """The figures that a method improves according to its paper: names of `lvlm_jax.pocket.claims.FIGURES`.

    By the first word of a method's name. DoLa's paper is about facts in text alone, so it makes no claim here.
    """
    yes_no, described = ("POPE accuracy", "POPE F1"), ("C_S", "C_I")
    all_figures = (*yes_no, *described)
    return {
        "cmac": all_figures,
        "eah": ("POPE F1", *described),
        "sevi": described,
        "clva": all_figures,
        "vcd": all_figures,
        "icd": yes_no,
        "pai": ("POPE F1", *described),
        "m3id": all_figures,
        "sid": all_figures,
        "vaf": yes_no,
        "middle": described,
        "deco": ("POPE F1", *described),
        "vista": ("POPE F1", *described),
        "nolan": yes_no,
        "avisc": all_figures,
        "damro": all_figures,
        "causalmm": yes_no,
        "ritual": all_figures,
        "only": all_figures,
        "memvr": all_figures,
        "var": all_figures,
        "spin": all_figures,
        "vhr": described,
        "farsight": all_figures,
        "sparc": ("caption F1",),
        "iat": described,
        "adaiat": described,
        "adhh": described,
        "nullu": ("POPE accuracy", *described),
        "vti": described,
        "capl": ("several images",),
        "dab": ("several images",),
        "opera": described,
    }
