"""Flow alignment: `lvlm train --config flow_alignment --config.data=prompts.jsonl --workdir runs/flow`.

Trains SEVI's effect into the weights, so that the exported checkpoint needs no method at inference.

`data` and `validation` are JSON lines `{"images": [...], "prompt": ...}`. Answers are generated under SEVI before
training begins, and stored in the work folder, unless the lines have a field `answer`. Files of conversations
(`{"images", "messages"}`) and of preference pairs (their chosen answers) also work.

The fields of `config.flow`:

    stage        the heads whose attention is trained. "1": heads that do not look at the text after the image,
                 toward the mean of the global heads; "2": the global heads, toward the maximum of the core heads;
                 "both" is stage 1 for the first half of the steps, then stage 2
    omega        how far the teacher draws a head to the better ones, ω; the paper has 4 (focused) and 0.5 (balanced)
    kappa        share of its attention to text that one token must have to make a core head, κ
    start_layer  first edited layer as a share of the depth; the paper's is layer 4 of 32 (focused) or 8 (balanced)
    mu           weight μ of the divergence of answer tokens from the teacher's; that of attention has weight 1, and is
                 a sum over layers and heads. At 0 the teacher never runs, which saves a forward pass

In the log: `attention_kl` and `answer_kl`, the two terms, in nats per answer token; `agreement`, the share of answer
tokens on which student and teacher agree; `moved_1` and `moved_2`, the share of heads that each stage moves, which
decreases as heads learn to look where they should. For `validation` also `base_answer_kl`, the untrained model's
distance, and `closer`, the factor by which the student is closer to the teacher.
"""

from ml_collections import ConfigDict

from lvlm_jax.training import settings


def get_config() -> ConfigDict:
    """LoRA of rank 16 on the language model, both stages in one epoch, toward SEVI's focused setting."""
    config = settings.base("flow_alignment")
    config.optimizer.peak = 1e-4
    config.length = 512
    config.flow.stage = "both"
    config.flow.omega = 4.0
    config.flow.kappa = 0.2
    config.flow.start_layer = 4 / 32
    config.flow.mu = 1.0
    return config
