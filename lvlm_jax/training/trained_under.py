"""The method whose attention a model is trained with, and the reasons why most methods cannot be used.

Training runs all rows of a conversation at once, through one branch. For each answer token it must compute the same as
a generation under the method. So an edit of a row may depend only on that row, and must treat rows of an answer like
rows of a prompt. CAPL and VAF are such methods.
"""

from typing import Any

from lvlm_jax.attention.transform import Transform, overrides
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.parse import method_for
from lvlm_jax.training.registry import Check

DOC = "method whose attention the model is trained with, as for --method, such as capl or vaf:enhance=1.2; or none"
CHECK = Check("method", "a method as for --method, or none", lambda value: isinstance(value, str))


def method_of(words: Any, model: LVLM, name: str) -> Method | None:
    """The method whose attention to train with; None for "none".

    Args:
        words: as `methods.parse` takes them.
        name: name of the model, for messages.

    Raises:
        LVLMError: there is no such method, it was fitted for another model, or no model can be trained under it.
    """
    method = method_for(words, lambda: model.hash, name)
    if method is not None:
        refuse(method, model.config.text.num_layers)
    return method


def refuse(method: Method, num_layers: int) -> None:
    """Raises an `LVLMError` that names the method if a model with `num_layers` layers cannot be trained under it."""
    if reason := _against(method, num_layers):
        raise LVLMError(f"nothing can be trained under {method.label}: it {reason}; use capl, vaf, or none")


def _against(method: Method, num_layers: int) -> str:
    """The reason against training under a method; "" if there is none."""
    if method.search is not None:
        return "is a search, which gives answers no likelihood"
    if method.combines or len(method.branches()) > 1:
        return "combines the logits of several branches or early exits, and training runs one branch"
    if method.warm_up_fields:
        return "needs a warm-up pass over every prompt"
    if method.tower_edit() is not None:
        return "edits the vision tower, which training runs plain"
    if method.step_by_step:
        return "edits a step depending on the step before"
    (edit,) = method.branches()
    reasons = (_against_edit(part, num_layers) for part in (edit.parts if edit else ()))
    return next(filter(None, reasons), "")


def _against_edit(edit: Transform, num_layers: int) -> str:
    if any(overrides(edit, stage) for stage in ("statistics", "observe", "enter")):
        return "edits rows depending on other rows"
    if not edit.attends():
        return ""
    if edit.rows == "last":
        return "edits the newest row alone, and training runs all rows of an answer at once"
    if not edit.by_rows:
        return "does not declare that it treats every row by itself (by_rows)"
    acts = (
        tuple(edit.active(layer, num_layers, phase) for phase in ("prefill", "decode")) for layer in range(num_layers)
    )
    if not edit.image_rows and any(prompt != answer for prompt, answer in acts):
        return "edits the text of a prompt in another way than that of an answer"
    return ""
