"""Command lines copied from the READMEs and scripts of LLaVA, VCD and OPERA."""

import pytest

from lvlm_jax import methods
from lvlm_jax.cli import common, evaluate, habits
from lvlm_jax.methods import parse
from tests.refusals import refused


def parsed(words):
    """The namespace and the method of a command line of `lvlm evaluate`."""
    ours = habits.translated(words.split(), habits.EVALUATE_SAME, habits.EVALUATE_ANSWERS)
    flags = evaluate.build_parser(common.ahead(ours, method="none").method).parse_args(ours)
    return flags, parse.build_method(flags.method, flags)


@pytest.mark.filterwarnings("ignore:.* here")
def test_copied_command_lines():
    flags, method = parsed(
        "--model-path M --question-file q.json --image-folder val2014 --use_cd --cd_alpha 1 --cd_beta=0.2 "
        "--noise_step 400 --seed 55"
    )
    assert method == methods.VCD(alpha=1.0, beta=0.2, noise_step=400) and str(flags.question_file) == "q.json"
    flags, method = parsed(
        "--model M --data_path COCO_2014/val2014 --pope-type random --beam 5 --scale_factor 50 --threshold 15 "
        "--num_attn_candidates 4 --penalty_weights 2 --method opera"
    )
    assert method == methods.OPERA(alpha=2.0, sigma=50.0, candidates=4, beams=5, threshold=15)
    assert (flags.group, str(flags.image_folder)) == (["random"], "COCO_2014/val2014")
    assert parsed("--model M --method cmac --use_cd --cd_alpha 3")[1] == methods.CMAC(alpha=3.0)
    for words, message in (  # what has no equal is answered
        ("--conv-mode llava_v1", "^--conv-mode: .*--system vicuna"),
        ("--gpu-id 0", "CUDA_VISIBLE_DEVICES"),
        ("--temperature 1.0", "^--temperature: the protocol determines it: pope/vcd samples"),
        ("--beam 5", "--beams is not a flag of this command; it is a setting of --method opera"),
        ("--answers-file a.jsonl", "below --out; --rescore FILE"),
    ):
        refused(message, parsed, f"--model M {words}")


def test_what_is_read_as_ours_is_said():
    with pytest.warns(UserWarning, match="^--cd_alpha is --alpha here$"):
        assert habits.translated(["--cd_alpha=2"], habits.SAME, habits.INFER_ANSWERS) == ["--alpha=2"]
    with pytest.warns(UserWarning, match="^--use_cd is --method vcd here$"):
        assert habits.translated(["--use_cd", "--prompt", "x"], habits.SAME, {})[:2] == ["--method", "vcd"]
