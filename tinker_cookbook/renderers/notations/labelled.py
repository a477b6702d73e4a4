"""Parsing replies whose reasoning has a label, as Gemma 4's; see replies/labelled.py."""

from __future__ import annotations

from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.parsing import ResponseParser
from tinker_cookbook.replies.grammar import Grammar
from tinker_cookbook.replies.labelled import THOUGHT_LABEL, LabelledReader

__all__ = ["THOUGHT_LABEL", "LabelledParser"]


class LabelledParser(ResponseParser):
    """Removes the label of the reasoning, and detects whether the prompt opened it."""

    def __init__(
        self,
        encoder: TextEncoder,
        grammar: Grammar,
        *,
        may_be_open: bool,
        label: str = THOUGHT_LABEL,
    ) -> None:
        super().__init__(encoder, grammar)
        self._reader = LabelledReader(grammar, self.mark_text, may_be_open=may_be_open, label=label)
