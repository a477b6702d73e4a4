"""Parsing Gemma 4's replies; see `tinker_cookbook.replies.labelled`."""

from __future__ import annotations

from tinker_cookbook.renderers.encoding import TextEncoder
from tinker_cookbook.renderers.parsing import ResponseParser
from tinker_cookbook.replies.grammar import Grammar
from tinker_cookbook.replies.labelled import THOUGHT_LABEL, LabelledReader

__all__ = ["THOUGHT_LABEL", "Gemma4Parser"]


class Gemma4Parser(ResponseParser):
    """Leaves out the label of the thinking channel, and tells whether the prompt had opened it."""

    def __init__(self, encoder: TextEncoder, grammar: Grammar, *, may_be_open: bool) -> None:
        super().__init__(encoder, grammar)
        self._reader = LabelledReader(grammar, self.mark_text, may_be_open=may_be_open)
