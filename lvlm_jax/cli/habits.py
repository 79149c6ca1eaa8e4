"""Flags of other programs (LLaVA, VCD, OPERA): some are translated to ours; for others, an error says what to do.

Translations are printed on stderr, so that users of a copied command line learn our flags.
"""

import warnings
from collections.abc import Mapping, Sequence

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import parse

# Their flag -> ours. VCD's strengths also belong to methods that contrast in the same way (CMAC,
# SID).
SAME = {
    "--cd-alpha": "--alpha",
    "--cd-beta": "--beta",
    "--data-path": "--image-folder",
    "--beam": "--beams",
    "--scale-factor": "--sigma",
    "--num-attn-candidates": "--candidates",
    "--penalty-weights": "--alpha",
}
ANSWERS = {
    "--conv-mode": "conversations follow the checkpoint's own template; --system vicuna sends Vicuna's sentence",
    "--model-base": "merge the weights first (lvlm convert), or give lvlm infer an --adapter",
    "--gpu-id": "set CUDA_VISIBLE_DEVICES before the command",
    "--num-workers": "nothing needs it; --batch-size is the number of questions at once",
    "--num-beams": "beam search is --method opera --beams N",
    "--options": "every setting is a separate flag; see --help",
}
DECIDED = "the protocol determines it: pope/vcd samples, pope/vcd-greedy and pope/opera do not; --list shows all"
EVALUATE_SAME = SAME | {
    "--pope-type": "--group",
    "--num-chunks": "--processes",
    "--chunk-idx": "--process-index",
    "--cap-file": "--rescore",
    "--gen-files": "--rescore",
    "--gt-files": "--question-file",
    "--cache": "--chair-pickle",
    "--coco-path": "--data",
}
EVALUATE_ANSWERS = ANSWERS | {
    "--answers-file": "answers are written below --out; --rescore FILE scores existing ones",
    **dict.fromkeys(("--sample", "--do-sample", "--temperature", "--top-p", "--top-k", "--max-new-tokens"), DECIDED),
}
INFER_ANSWERS = ANSWERS | {
    "--sample": "--temperature 1 samples",
    "--do-sample": "--temperature 1 samples",
    "--num-chunks": "lvlm evaluate shares its questions among --processes",
    "--chunk-idx": "lvlm evaluate shares its questions among --processes",
    "--pope-type": "POPE is scored by lvlm evaluate --protocol pope/opera --group random",
}


def translated(words: Sequence[str], same: Mapping[str, str], answers: Mapping[str, str]) -> list[str]:
    """Translates the flags of other programs; VCD's `--use_cd` becomes its method if none is given.

    Args:
        words: the command line.
        same: their flag -> ours.
        answers: flags without an equal here -> what to do instead.

    Raises:
        LVLMError: the command line has one of `answers`.
    """
    result = []
    has_method = any(word.partition("=")[0] == "--method" for word in words)
    for word in words:
        name, equals, value = parse.hyphenated(word).partition("=")
        flag_name = word.partition("=")[0]
        if name in answers:
            raise LVLMError(f"{flag_name}: {answers[name]}")
        if name in same:
            result.append(same[name] + equals + value)
            _say(flag_name, same[name])
        elif name == "--use-cd":
            result += [] if has_method else ["--method", "vcd"]
            _say(flag_name, "--method vcd")
        else:
            result.append(word)
    return result


def _say(theirs: str, ours: str) -> None:
    warnings.warn(f"{theirs} is {ours} here", stacklevel=3)
