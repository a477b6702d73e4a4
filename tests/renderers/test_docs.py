"""The code in docs/renderers.md and docs/adding_a_renderer.md runs; the tables are complete."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.assets import load_tokenizer
from tinker_cookbook import renderers
from tinker_cookbook.renderers import ParseTermination
from tinker_cookbook.renderers.built_in import BUILT_IN

from .families import FAMILIES
from .parity_table import COLUMNS, format_table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "renderers.md").read_text("utf-8")
MEASURED = (DOCS / "measurements" / "renderers.md").read_text("utf-8")


def run(page: str) -> dict[str, Any]:
    """Run all code of a page in one module."""
    names: dict[str, Any] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs", "exec"), names)
    return names


def test_first_example() -> None:
    names = run(PAGE)
    assert names["message"]["content"] == "Hello!"
    assert names["termination"] is ParseTermination.STOP_SEQUENCE


BRIEF_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\\n' }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}"
    "{% endif %}{{ message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def test_the_example_of_a_new_format_equals_its_chat_template() -> None:
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(load_tokenizer("smollm2").backend_tokenizer.to_str())
    markers = [*(f"<|{role}|>" for role in ("system", "user", "assistant")), "<|end|>"]
    markers += ["<think>", "</think>"]
    backend.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.chat_template = BRIEF_TEMPLATE
    names = run((DOCS / "adding_a_renderer.md").read_text("utf-8"))
    try:
        report = names["check"](tokenizer)
    finally:
        renderers.unregister_renderer("brief")
    assert report.problems == {}
    assert report.fits
    assert report.counts["same tokens"] > 50


def test_the_table_of_formats_is_what_the_modules_say() -> None:
    assert format_table() in PAGE, "run python -m tests.renderers.parity_table --formats"
    assert set(BUILT_IN) == set(renderers.get_renderer_names())


def test_every_family_is_measured() -> None:
    columns = len(COLUMNS)
    rows = [
        line.strip("| ").split(" | ") for line in MEASURED.splitlines() if line.startswith("| ")
    ]
    start = rows.index(list(COLUMNS))
    measured = {row[0] for row in rows[start:] if len(row) == columns}
    assert measured >= FAMILIES.keys()
    for row in rows[start:]:
        if row[0] in FAMILIES and len(row) == columns:
            assert [cell for cell in row[4:8] if len(set(cell.split("/"))) > 1] == [], row[0]
