"""Methods from words."""

import argparse

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import CMAC, EAH, ICD, SEVI, VISTA, DoLa, Method, chain, parse
from lvlm_jax.methods.parse import as_method


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (" none ", None),
        ("cmac", CMAC()),
        ("CMAC", CMAC()),
        ("cmac:alpha=1,beta=0.3", CMAC(alpha=1.0, beta=0.3)),
        ("cmac:gamma=none,imd=false,distort=value_noise", CMAC(imd=False, distort="value_noise")),
        ("cmac/llava-1.5/chair", CMAC(alpha=1.0, beta=0.2)),
        ("cmac/llava-1.5/chair:beta=1e-1", CMAC(alpha=1.0, beta=0.1)),
        ("sevi/balanced", SEVI(omega=0.5, start_layer=8)),
        ("sevi/focused+cicd", SEVI(cicd=True)),
        ("sevi/balanced+cicd:layers=8,9,kappa=.3", SEVI(omega=0.5, start_layer=8, cicd=True, layers=(8, 9), kappa=0.3)),
        ("sevi/focused+cmac", chain(SEVI(), CMAC())),
        ("eah:beta=1e+3+cmac:alpha=1,start=", None),
        ("eah:beta=1e+3+cmac:alpha=1", chain(EAH(beta=1e3), CMAC(alpha=1.0))),
        ("dola:layers=high", DoLa(layers="high")),
        ("vista:lambda=0.2,start-layer=0.5,layers=[3]", VISTA(lambda_=0.2, start_layer=0.5, layers=(3,))),
        ("icd:prompt=Well, I see: a + b", None),
        ("icd:prompt=Well, I see: nothing", ICD(prompt="Well, I see: nothing")),
    ],
)
def test_words_name_methods(words, method):
    if method is None and "none" not in words:
        with pytest.raises(LVLMError):
            as_method(words)
    else:
        assert as_method(words) == method


@pytest.mark.parametrize("value", [None, CMAC(), chain(EAH(), CMAC())], ids=["none", "method", "chain"])
def test_methods_stay_what_they_are(value):
    assert as_method(value) is value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cmac/bold", "CMAC has no preset 'bold'; expected one of llava-1.5/pope"),
        ("cmac:gama=1", "cmac has no setting 'gama=1'; expected name=value with one of alpha, beta, gamma"),
        ("cmac:alpha=much", "cmac: alpha is 'much'; expected a number"),
        ("cmac:alpha=-1", r"CMAC: alpha is -1.0; expected a number >= 0"),
        ("cmac:alpha=none", "cmac: alpha is 'none'; expected a number"),
        ("cmac:imd=maybe", "CMAC: imd is 'maybe'; expected one of True, False"),
        ("sevi/other:other_image=3", "sevi has no setting 'other_image=3'"),
        ("vcd+pai", "VCD and PAI cannot be chained"),
        ("", "there is no method ''"),
        ("cmca", r"there is no method 'cmca'; did you mean cmac\?"),
    ],
)
def test_words_that_say_nothing_are_refused(words, message):
    with pytest.raises(LVLMError, match=message):
        as_method(words)


def flags(words, *arguments):
    """The method of a command line."""
    parser = argparse.ArgumentParser()
    parse.add_method_flags(parser, words)
    return parse.build_method(words, parser.parse_args(arguments))


def test_flags_overrule_words_and_words_a_preset():
    assert flags("cmac:alpha=2,beta=0.4", "--beta", "0.5", "--preset", "llava-1.5/mme") == CMAC(alpha=2.0, beta=0.5)
    assert flags("eah+cmac:alpha=2", "--cmac-beta", "0.5", "--no-imd") == chain(
        EAH(), CMAC(alpha=2.0, beta=0.5, imd=False)
    )
    both: Method = flags("cmac/llava-1.5/mme", "--preset", "llava-1.5/chair")
    assert both == CMAC.preset("llava-1.5/chair")
