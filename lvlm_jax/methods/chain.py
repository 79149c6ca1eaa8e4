"""Several methods at once: `chain(EAH(), CMAC())`.

The members' attention edits are applied in the given order, on the main branch and on a contrast branch that reads the
same prompt. A contrast branch with its own prompt (VCD, ICD, PAI, M3ID) gets only its own method's edits. The contrast
branch, the combination of logits and the positions can each come from only one member; if two members have one, the
chain is refused.
"""

from typing import Any

from lvlm_jax.attention import Chain, Transform
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import WARM_UP_FIELDS, Method, Readout, frozen
from lvlm_jax.methods.tower import TowerEdit, TowerEdits


def chain(*members: Method) -> Method:
    """Composes methods into one; a single method is returned as it is.

    Raises:
        LVLMError: there are no methods, or they contradict each other.
    """
    flat = [one for member in members for one in (member.members if isinstance(member, Chained) else (member,))]
    if not flat:
        raise LVLMError("chain() needs at least one method")
    return flat[0] if len(flat) == 1 else Chained(tuple(flat))


@frozen
class Chained(Method):
    """Several methods as one; made by `chain`."""

    members: tuple[Method, ...]

    def __post_init__(self):
        self._only("contrast branch", lambda member: len(member.branches()) > 1)
        self._only("combination of logits", lambda member: member.combines)
        for kind in ("probe", "tower"):
            self._only(f"{kind} of the prompt", lambda member, kind=kind: kind in member.warm_up_fields)
        self._only("positions", lambda member: _has_own(member, "positions"))
        for member in self.members:
            if member.search is not None:
                raise LVLMError(f"{member.label} is a search and cannot be chained with other methods; use it alone")

    @property
    def label(self) -> str:
        return " + ".join(member.label for member in self.members)

    def branches(self) -> tuple[Transform | None, ...]:
        branches = [member.branches() for member in self.members]
        main = _merged([transforms[0] for transforms in branches])
        if all(len(transforms) == 1 for transforms in branches):
            return (main,)
        own = next(transforms[1:] for transforms in branches if len(transforms) > 1)
        if self.contrast_prompt() != "same":
            return (main, *own)
        return (main, _merged([transforms[-1] for transforms in branches]))

    def positions(self, position, images_before, image_tokens):
        owner = self._owner("positions")
        return owner and owner.positions(position, images_before, image_tokens)

    def contrast_prompt(self) -> str:
        owner = self._contrasting()
        return owner.contrast_prompt() if owner else "same"

    def contrast_pixels(self, pixels, image_index):
        owner = self._contrasting()
        return owner.contrast_pixels(pixels, image_index) if owner else pixels

    def contrast_image(self, picture, index):
        return self._contrasting().contrast_image(picture, index)

    def contrast_tokens(self, embeddings, image_id):
        return self._contrasting().contrast_tokens(embeddings, image_id)

    def tower_edit(self) -> TowerEdit | None:
        edits = tuple(edit for member in self.members if (edit := member.tower_edit()) is not None)
        return TowerEdits(edits) if len(edits) > 1 else edits[0] if edits else None

    def tower_values(self, layer, values, valid):
        return next(member for member in self.members if "tower" in member.warm_up_fields).tower_values(
            layer, values, valid
        )

    def keep_tokens(self, image_id, image_count, salience):
        return self._contrasting().keep_tokens(image_id, image_count, salience)

    def contrast_picture(self, height, width):
        return self._contrasting().contrast_picture(height, width)

    def contrast_words(self):
        owner = self._contrasting()
        return owner.contrast_words() if owner else ()

    def keeps_instruction(self) -> bool:
        owner = self._contrasting()
        return owner.keeps_instruction() if owner else True

    @property
    def exit_norm(self) -> bool:
        owner = self._combiner()
        return owner.exit_norm if owner else True

    @property
    def warm_up_fields(self) -> tuple[str, ...]:
        return tuple(name for name in WARM_UP_FIELDS if any(name in member.warm_up_fields for member in self.members))

    @property
    def combines(self) -> bool:
        return self._combiner() is not None

    def exits(self, num_layers: int) -> tuple[int, ...]:
        owner = self._combiner()
        return owner.exits(num_layers) if owner else ()

    def further_exits(self, carry: Any):
        owner = self._combiner()
        return owner and owner.further_exits(self._carry_of(owner, carry))

    @property
    def step_by_step(self) -> bool:
        return any(member.step_by_step for member in self.members)

    @property
    def independent_rows(self) -> bool:
        return all(member.independent_rows for member in self.members)

    def probe(self) -> Transform:
        return next(member for member in self.members if "probe" in member.warm_up_fields).probe()

    def after_warm_up(self, warm_up) -> "Chained":
        return Chained(tuple(member.after_warm_up(warm_up) for member in self.members))

    def remember(self, carry: Any, previous: Any) -> tuple:
        before = previous or (None,) * len(self.members)
        each = zip(self.members, self._carries(carry), before, strict=True)
        return tuple(member.remember(own, memory) for member, own, memory in each)

    def recall(self, previous: Any) -> "Chained":
        return Chained(tuple(member.recall(memory) for member, memory in zip(self.members, previous, strict=True)))

    def start(self, batch: int) -> Any:
        owner = self._combiner()
        return owner.start(batch) if owner else ()

    def combine(self, readout: Readout, memory: Any):
        owner = self._combiner()
        if owner is None:
            return readout.main, memory
        return owner.combine(readout._replace(carry=self._carry_of(owner, readout.carry)), memory)

    def _carries(self, carry: Any) -> list[Any]:
        """Each member's part of the main branch's carry, () for a member without edits."""
        edits = [member.branches()[0] is not None for member in self.members]
        own = iter(carry if sum(edits) > 1 else (carry,))
        return [next(own) if edit else () for edit in edits]

    def _carry_of(self, owner: Method, carry: Any) -> Any:
        """The part of the main branch's carry that belongs to one member."""
        index = next(place for place, member in enumerate(self.members) if member is owner)
        return self._carries(carry)[index]

    def _owner(self, name: str) -> Method | None:
        return next((member for member in self.members if _has_own(member, name)), None)

    def _contrasting(self) -> Method | None:
        return next((member for member in self.members if len(member.branches()) > 1), None)

    def _combiner(self) -> Method | None:
        return next((member for member in self.members if member.combines), None)

    def _only(self, what: str, wants) -> None:
        owners = [type(member).__name__ for member in self.members if wants(member)]
        if len(owners) > 1:
            raise LVLMError(
                f"{' and '.join(owners)} cannot be chained: each needs its own {what}; use only one of them"
            )


def _has_own(member: Method, name: str) -> bool:
    return getattr(type(member), name) is not getattr(Method, name)


def _merged(transforms: list[Transform | None]) -> Transform | None:
    present = [transform for transform in transforms if transform is not None]
    return None if not present else present[0] if len(present) == 1 else Chain(tuple(present))
