"""The cost of reading a reply: linear in its length even for hostile ones; each mark is read
once."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import replace

import pytest

from tinker_cookbook.replies.loose import MARKS, call_is_open, loose_grammar, read_calls
from tinker_cookbook.replies.reader import ReplyReader
from tinker_cookbook.replies.scanner import MarkScanner

CLOSE = "</tool_call>"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"a": "' + CLOSE * 2000,
        f'<tool_call>"{CLOSE}' + f'<tool_call>""{CLOSE}' * 1000,
        f'<tool_call>"{CLOSE}' + f"<tool_call>x{CLOSE}" * 1000,
        '[TOOL_CALLS]f[ARGS]{"a": "' + "[TOOL_CALLS]" * 2000,
        "<tool_call><function=f><parameter=a>" + CLOSE * 2000,
    ],
)
def test_calls_are_looked_at_a_few_times_only(text: str) -> None:
    looked_at: list[int] = []

    def is_open(body: str) -> bool:
        looked_at.append(len(body))
        return call_is_open(body)

    grammar = loose_grammar(parse_call=lambda parts, raw: read_calls("".join(map(str, parts)), raw))
    tolerance = replace(grammar.tolerance, call_is_open=is_open)
    reader = ReplyReader(replace(grammar, tolerance=tolerance))
    scanner = MarkScanner(reader, MARKS)
    pieces = [*scanner.text(text), *scanner.end(is_cut=False)]
    assert "".join(piece.text for piece in pieces) == text
    assert looked_at
    assert sum(looked_at) < 100 * len(text)
