"""Flags of the programs of others (LLaVA, VCD, OPERA): read as ours where we have the same, else answered in one line.

What is read as ours is said on stderr, so that a copied command line teaches the flags of this one.
"""

import warnings
from collections.abc import Mapping, Sequence

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import parse

# Theirs -> ours, with as many words. VCD's strengths are those of all who contrast as it does (CMAC, SID).
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
    "--num-workers": "nothing needs it; --batch-size is how many questions are answered at once",
    "--num-beams": "beam search is --method opera --beams N",
    "--options": "every setting is a flag of its own; see --help",
}
DECIDED = "the protocol decides that: pope/vcd samples, pope/vcd-greedy and pope/opera do not; --list shows all"
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
    "--answers-file": "answers are written below --out; --rescore FILE scores those of others",
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
    """A command line with the flags of others in our names; VCD's `--use_cd` is its method, where none is named.

    Args:
        same: theirs -> ours.
        answers: flags that have no equal here -> what to do instead.

    Raises:
        LVLMError: one of `answers`.
    """
    found = []
    named = any(word.partition("=")[0] == "--method" for word in words)
    for word in words:
        name, equals, value = parse.hyphenated(word).partition("=")
        written = word.partition("=")[0]
        if name in answers:
            raise LVLMError(f"{written}: {answers[name]}")
        if name in same:
            found.append(same[name] + equals + value)
            _say(written, same[name])
        elif name == "--use-cd":
            found += [] if named else ["--method", "vcd"]
            _say(written, "--method vcd")
        else:
            found.append(word)
    return found


def _say(theirs: str, ours: str) -> None:
    warnings.warn(f"{theirs} is {ours} here", stacklevel=3)
