"""The two tools: a calculator, and a search in documents on this machine."""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from typing import Annotated

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.tool_use import tool

MAX_EXPRESSION = 100
MAX_NUMBER = 10**12
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def evaluate(expression: str) -> float:
    """Compute an expression of numbers, + - * / and parentheses.

    Raises:
        ValueError: with the problem in words; the model reads it.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"the expression is longer than {MAX_EXPRESSION} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError("the expression must be numbers with + - * / and parentheses") from error


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant):
        found = _number(node.value)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        found = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        found = OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError("only numbers, + - * / and parentheses are understood")
    if abs(found) > MAX_NUMBER:
        raise ValueError("the number is too large")
    return found


@tool
def calculator(expression: Annotated[str, "such as 12 * 3"]) -> str:
    """Compute a number."""
    value = evaluate(expression)
    return str(int(value)) if value == int(value) else f"{value:.6g}"


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    raise ValueError("only numbers, + - * / and parentheses are understood")


class SearchIndex:
    """Documents ranked by BM25 (Robertson and Zaragoza 2009, doi:10.1561/1500000019)."""

    def __init__(self, documents: Sequence[str], num_results: int = 1) -> None:
        """Index the documents.

        Raises:
            ConfigurationError: if the package bm25s is not installed.
        """
        try:
            import bm25s
        except ImportError as error:
            raise ConfigurationError(
                "the search tool needs the package bm25s; run pip install 'tinker-cookbook[search]'"
                " or use tasks=calculator."
            ) from error
        self._documents = list(documents)
        self._num_results = min(num_results, len(self._documents))
        self._ranking = bm25s.BM25()
        self._ranking.index(self._split(self._documents), show_progress=False)

    @tool
    def search(self, query: Annotated[str, "words to find"]) -> str:
        """Find out about people."""
        found, scores = self._ranking.retrieve(
            self._split([query]), k=self._num_results, show_progress=False
        )
        hits = [self._documents[i] for i, score in zip(found[0], scores[0], strict=True) if score]
        return " ".join(hits) or "Nothing was found."

    def _split(self, texts: list[str]):
        import bm25s

        return bm25s.tokenize(texts, stopwords=[], show_progress=False)
