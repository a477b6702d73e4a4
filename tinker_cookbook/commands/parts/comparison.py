"""One conversation encoded by a renderer and by the model's chat template, to be compared."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tinker_cookbook.renderers.battery.differences import Difference

__all__ = ["DIFFERENT", "MEANT", "REFUSED", "SAME", "Comparison"]

SAME, MEANT, DIFFERENT = "same tokens", "same text, other token borders", "different"
REFUSED = "refused"


class Comparison(NamedTuple):
    """The two encodings of one conversation."""

    where: str
    ours: list[int]
    theirs: list[int]
    differences: list[Difference]
    refusal: str = ""
    """Why there are no tokens to compare: the renderer or the template refuses the conversation."""

    @property
    def kind(self) -> str:
        """The result of the comparison."""
        if self.refusal:
            return REFUSED
        if not self.differences:
            return SAME
        return MEANT if all(found.is_meant for found in self.differences) else DIFFERENT

    @property
    def heading(self) -> str:
        """The heading of the comparison in the report."""
        if self.refusal:
            return f"{self.where}: {self.refusal}"
        counts = Counter(found.kind.value for found in self.differences)
        reasons = "".join(f"; {count} x {reason}" for reason, count in counts.items())
        return f"{self.where}: {self.kind} ({len(self.ours)} tokens{reasons})"
