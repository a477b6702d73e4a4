"""Tool calls whose markers are ordinary text, for models whose vocabulary has no token for them.

Such a model writes `<tool_call>` in several tokens, so the parser looks for the markers in the text
of the reply. (Text of the prompt is never parsed.) A marker within a string of a call's JSON is
part of that string.
"""

from __future__ import annotations

from dataclasses import replace

from tinker_cookbook.renderers.encoding.encoder import TextEncoder
from tinker_cookbook.renderers.parsing import ResponseParser
from tinker_cookbook.replies.grammar import Grammar, TextMark, Tolerance
from tinker_cookbook.replies.json_source import ends_in_string
from tinker_cookbook.replies.scanner import MarkScanner

__all__ = ["TextCallParser"]


class TextCallParser(ResponseParser):
    """Parses one reply; holds back text that may be the beginning of a marker."""

    def __init__(
        self, encoder: TextEncoder, grammar: Grammar, call_open: str, call_close: str
    ) -> None:
        """Keep the markers.

        Args:
            encoder: the renderer's encoder.
            grammar: the grammar, without tokens for calls.
            call_open: the text before a call.
            call_close: the text after a call.
        """
        call = TextMark(call_open), TextMark(call_close)
        tolerance = Tolerance(call_is_open=ends_in_string)
        super().__init__(encoder, replace(grammar, call=call, tolerance=tolerance))
        self._reader = MarkScanner(self._reader, call)
