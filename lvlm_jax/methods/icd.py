"""ICD: contrast with the same prompt under a disturbing instruction. arXiv 2403.18715.

The contrast branch reads `prompt` (or the token ids in `tokens`, if there is no tokenizer) instead of the system
prompt. If a conversation has no system message, `prompt` comes right after the beginning-of-text token. Then comes the
rest of the main prompt with its images, at correspondingly later positions.

    (1 + α) l - α l~   where l >= max l + ln β

If the Q-Former reads the instruction (InstructBLIP), the words go there instead: qformer="question" puts them before
the instruction, qformer="normal" replaces the instruction. The text for the decoder is unchanged.

Differs from the authors' code in: nothing known. Their LLaVA program writes the sentence into a conversation template
of its own; here it replaces the system message.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second prompt, and one more row through the weights per token. The vision pass is shared.
"""

from typing import ClassVar

from lvlm_jax.methods.base import Method, Readout, Strength, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, contrast_logits, where_image
from lvlm_jax.methods.registry import register

DISTURBANCE = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@register("icd")
class ICD(Method):
    """Instruction contrastive decoding; see the module for the formulas."""

    alpha: Strength = strength(1.0, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    prompt: str = switch(DISTURBANCE, "the disturbing instruction")
    tokens: tuple[int, ...] | None = switch(None, "token ids of the instruction, used instead of `prompt`")
    qformer: str = switch(
        "question",
        "whether a Q-Former reads the words before the question, or instead of it",
        choices=("question", "normal"),
    )

    PRESETS: ClassVar = {"default": dict(alpha=1.0, beta=0.1)}

    def branches(self):
        return (ImagePresence(), None)

    def contrast_prompt(self) -> str:
        return "text"

    def contrast_words(self):
        return self.prompt if self.tokens is None else self.tokens

    def keeps_instruction(self) -> bool:
        return self.qformer == "question"

    def combine(self, readout: Readout, memory):
        combined = contrast_logits(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory
