"""The reader of Gemma 4's replies: reasoning has a label, and a prompt may have opened it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tinker_cookbook.replies.grammar import Grammar, Mark
from tinker_cookbook.replies.reader import ReadState, ReplyReader

__all__ = ["THOUGHT_LABEL", "LabelledReader"]

THOUGHT_LABEL = "thought\n"


class LabelledReader(ReplyReader):
    """Removes the label of the thinking channel, and detects whether the prompt opened it.

    A reply to a tool result starts inside the channel, a reply to a user does not. Only the first
    mark shows which case it is, so the text before that mark is held back.
    """

    def __init__(
        self,
        grammar: Grammar,
        mark_text: Callable[[Mark], str] = str,
        *,
        may_be_open: bool,
        label: str = THOUGHT_LABEL,
    ) -> None:
        """Prepare for a reply.

        Args:
            grammar: of the format.
            mark_text: returns a mark as text.
            may_be_open: whether a prompt may have opened the reasoning.
            label: the text between the opening mark of reasoning and the reasoning.
        """
        super().__init__(grammar, mark_text)
        self._full_label = label
        self._start: str | None = "" if may_be_open else None
        self._label: str | None = "" if grammar.starts_in_thinking else None

    def end(self, *, is_cut: bool) -> Iterator[object]:
        yield from self._release()
        yield from super().end(is_cut=is_cut)

    def _take_mark(self, mark: Mark) -> Iterator[object]:
        if self._start is not None and mark == self._think_close:
            self._state = ReadState.THINK
        yield from self._release()
        before = self._state
        yield from super()._take_mark(mark)
        if self._state is ReadState.THINK and before is not ReadState.THINK:
            self._label = ""

    def _take_text(self, text: str) -> Iterator[object]:
        if self._start is not None:
            self._start += text
            return
        if self._label is not None:
            held = self._label + text
            if len(held) < len(self._full_label) and self._full_label.startswith(held):
                self._label = held
                return
            self._label, text = None, held.removeprefix(self._full_label)
        yield from super()._take_text(text)

    def _release(self) -> Iterator[object]:
        """Yield what was held back: the start of the reply, or an unfinished label."""
        label = "" if self._label == self._full_label.rstrip() else self._label
        held = (self._start or "") + (label or "")
        self._start = self._label = None
        yield from super()._take_text(held)
