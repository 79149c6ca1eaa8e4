"""ICD: contrast against the same prompt under a disturbing instruction. arXiv 2403.18715.

The contrast branch reads `prompt` (or the token ids in `tokens`, where there is no tokenizer) in the place of the
system prompt, whose tokens are gone; where a conversation has no system message, right after the token that begins
every text. Then comes the rest of the main prompt with its images; later tokens move on accordingly.

    (1 + α) l - α l~   where l >= max l + ln β

A model that reads its images with the instruction in mind (InstructBLIP's Q-Former) gets the words there instead:
qformer="question" puts them before the instruction, qformer="normal" alone in its place. What its decoder reads
besides the images stays.

Differs from the authors' code in: nothing known. Their LLaVA program writes the sentence into a conversation template
of its own; here it takes the place of the system message that the conversation has.

Rows, layers, stages: none; the attention of both branches is plain. A sample without an image is left alone.
Cost: a second prompt, and one more row through the weights per token. The vision pass is shared.
"""

from typing import ClassVar

from lvlm_jax.methods.base import Method, Readout, Strength, contrasted, strength, switch
from lvlm_jax.methods.contrast import ImagePresence, where_image
from lvlm_jax.methods.registry import register

DISTURBANCE = "You are a confused objects detector to provide a fuzzy overview or impression of the image."


@register("icd")
class ICD(Method):
    """Instruction contrastive decoding; see the module for the formulas."""

    alpha: Strength = strength(1.0, "contrast strength α", low=0)
    beta: Strength = strength(0.1, "plausibility cut β", low=0, high=1, cuts=True)
    prompt: str = switch(DISTURBANCE, "the disturbing instruction")
    tokens: tuple[int, ...] | None = switch(None, "its token ids; they overrule `prompt`")
    qformer: str = switch(
        "question", "where a Q-Former reads the words: before the question, or alone", choices=("question", "normal")
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
        combined = contrasted(readout.main, readout.contrast, self.alpha, self.beta)
        return where_image(readout.carry, combined, readout.main), memory
