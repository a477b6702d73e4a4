"""Reports that code writes as it runs."""

# pyright: reportIndexIssue=false

from __future__ import annotations

import asyncio
import html.parser
import json
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import DataValidationError
from tinker_cookbook.renderers.types import Message, ToolCall
from tinker_cookbook.utils import logtree
from tinker_cookbook.utils.logtree_formatters import ConversationFormatter

VOID = {"meta", "link", "br"}


class Page(html.parser.HTMLParser):
    """Elements with their texts, as (path of tags, text); refuses what is not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        del attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(("/".join(self.open), data.strip()))

    def path_of(self, text: str) -> str:
        return next(path for path, found in self.texts if found == text)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_sections_nest_and_their_headers_with_them(tmp_path: Path):
    path = tmp_path / "new" / "report.html"
    with logtree.init_trace("Step 3", path=path):
        with logtree.scope_header("Outer", class_="wide", data_step=3):
            logtree.log_text("a < b & c")
            with logtree.scope_header("Inner"), logtree.scope_div():
                logtree.header("Deep")
        logtree.log_text("after")
    page = read(path)
    assert page.path_of("Step 3") in ("html/head/title", "html/body/h1")
    assert page.path_of("Outer") == "html/body/section/h2"
    assert page.path_of("a < b & c") == "html/body/section/p"
    assert page.path_of("Inner") == "html/body/section/section/h3"
    assert page.path_of("Deep") == "html/body/section/section/div/h4"
    assert page.path_of("after") == "html/body/p"
    assert '<section class="wide" data-step="3">' in path.read_text()


def test_without_a_trace_nothing_happens_and_nothing_fails():
    @logtree.scope_header_decorator
    def work() -> int:
        logtree.log_text("x")
        logtree.table(object())  # not even looked at
        return 5

    with logtree.scope_details("more"), logtree.scope_disable():
        assert work() == 5
    assert logtree.current_trace() is None
    assert not logtree.flush_trace()


def test_disabled_parts_are_left_out():
    with logtree.init_trace("t") as trace:
        for index in range(3):
            with (
                logtree.optional_enable_logging(index == 1),
                logtree.scope_header(f"group {index}"),
            ):
                logtree.log_text(f"text {index}")
        with logtree.scope_disable(), logtree.scope_header("hidden"):
            logtree.log_text("hidden too")
        logtree.log_text("end")
    body = trace.body_html()
    assert [word for word in ("group 1", "text 1", "end") if word in body] == [
        "group 1",
        "text 1",
        "end",
    ]
    assert not [word for word in ("group 0", "text 2", "hidden") if word in body]


def test_tasks_and_threads_log_where_they_were_started():
    @logtree.scope_header_decorator("Worker")
    async def work(name: str) -> None:
        logtree.log_text(f"{name} starts")
        await asyncio.sleep(0.01)
        await asyncio.to_thread(logtree.log_text, f"{name} ends")

    async def work_all() -> None:
        await asyncio.gather(*(work(name) for name in "abc"))

    with logtree.init_trace("t") as trace:
        asyncio.run(work_all())
    sections = trace.to_dict()["root"]["children"][1:]
    texts = [[child["children"][0] for child in section["children"]] for section in sections]
    assert texts == [["Worker", f"{name} starts", f"{name} ends"] for name in "abc"]


def test_an_exception_is_shown_and_goes_on(tmp_path: Path):
    path = tmp_path / "report.html"

    def fail() -> None:
        with logtree.init_trace("t", path=path):
            logtree.log_text("before")
            raise KeyError("missing <key>")

    with pytest.raises(KeyError):
        fail()
    page = read(path)
    assert page.path_of("before") == "html/body/p"
    assert page.path_of("Exception: KeyError: 'missing <key>'") == "html/body/section/h2"
    unwritten = tmp_path / "no.html"
    with pytest.raises(KeyError), logtree.init_trace("t", path=unwritten, write_on_error=False):
        raise KeyError("x")
    assert not unwritten.exists()


@pytest.mark.parametrize(
    ("value", "columns", "rows"),
    [
        ([{"a": 1}, {"a": 2, "b": 3}], ["a", "b"], [[1, ""], [2, 3]]),
        ([[1, 2], [3, 4]], [], [[1, 2], [3, 4]]),
        ({"a": [1, 2], "b": [3, 4]}, ["a", "b"], [[1, 3], [2, 4]]),
        ({"lr": 0.1, "name": "x"}, ["key", "value"], [["lr", 0.1], ["name", "x"]]),
    ],
)
def test_tables(value: object, columns: list, rows: list):
    with logtree.init_trace("t") as trace:
        logtree.table(value, caption="Numbers")
    table = trace.to_dict()["root"]["children"][1]
    assert table["data"] == {"type": "table", "columns": columns, "rows": rows}
    assert table["children"][0] == {"tag": "caption", "children": ["Numbers"]}
    cells = [text for path, text in Page(trace.get_html()).texts if path.endswith(("th", "td"))]
    assert cells == [
        str(x) for row in ([columns] if columns else []) + rows for x in row if x != ""
    ]


def test_tables_are_sorted_and_wrong_ones_refused():
    with logtree.init_trace("t") as trace:
        logtree.table_from_dict({"b": 1, "a": 2}, sort_by="key")
        logtree.table_from_dict({"b": 2, "a": 1}, sort_by="value")
        logtree.table_from_dict_of_lists({"a": [1], "b": [2]}, order=["b"])
        with pytest.raises(DataValidationError, match="sort_by='size'"):
            logtree.table_from_dict({}, sort_by="size")
        with pytest.raises(DataValidationError, match="lengths"):
            logtree.table_from_dict_of_lists({"a": [1], "b": []})
        with pytest.raises(DataValidationError, match="is not a table"):
            logtree.table(5)
    rows = [table["data"]["rows"] for table in trace.to_dict()["root"]["children"][1:]]
    assert rows == [[["a", 2], ["b", 1]], [["a", 1], ["b", 2]], [[2]]]


def test_conversations_keep_calls_and_escape_texts():
    call = ToolCall(function=ToolCall.FunctionBody(name="add", arguments='{"a": 1}'), id="c1")
    messages: list[Message] = [
        {"role": "user", "content": "<b>2 + 2?</b>"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "4"}],
            "tool_calls": [call],
        },
    ]
    with logtree.init_trace("t") as trace:
        for _ in range(2):
            logtree.log_formatter(ConversationFormatter(messages=messages))
    page = trace.get_html()
    Page(page)
    assert "&lt;b&gt;2 + 2?&lt;/b&gt;" in page
    assert "add({&quot;a&quot;: 1})" in page
    assert page.count(".lt-conversation {") == 1
    data = trace.to_dict()["root"]["children"][1]["data"]
    assert data["messages"][1]["content"][0] == {"type": "thinking", "thinking": "hm"}
    assert data["messages"][1]["tool_calls"][0]["function"]["name"] == "add"


def test_files_of_ones_own(tmp_path: Path):
    import jinja2

    with logtree.init_trace("Report", path=tmp_path / "r.html") as trace:
        logtree.log_html("<em>x</em>", div_class="mine")
        logtree.details("line 1\n  line 2", summary="Open")
        assert logtree.flush_trace()
        assert '<div class="mine">' in (tmp_path / "r.html").read_text()
    theme = logtree.Theme(
        css_text="p {}", css_urls=["https://x.example/a.css"], css_vars={"c": "1"}
    )
    target = tmp_path / "own.html"
    logtree.write_html_with_default_style("<p>hi</p>", target, title="Own", theme=theme)
    assert read(target).path_of("hi") == "html/body/p"
    assert "--c: 1" in target.read_text()
    logtree.write_trace_json(trace, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["title"] == "Report"
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"t": "{{ title }}|{{ body_html }}|{{ more }}"})
    )
    text = logtree.render_with_jinja(
        environment, "t", context=logtree.jinja_context(trace, more=7), write_to=tmp_path / "t"
    )
    assert text.startswith("Report|")
    assert text.endswith("|7")
    assert "line 1\n  line 2" in (tmp_path / "t").read_text()


def test_half_a_character_does_not_end_a_run(tmp_path: Path):
    with logtree.init_trace("t", path=tmp_path / "t.html"):
        logtree.log_text("half \ud83d")
    assert "half \\ud83d" in (tmp_path / "t.html").read_text(encoding="utf-8")
