"""Schedules, small functions, names, deprecation, git state, spans, progress."""

# pyright: reportCallIssue=false

import asyncio
import contextlib
import fcntl
import io
import json
import os
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.utils import misc_utils, trace
from tinker_cookbook.utils.code_state import code_state
from tinker_cookbook.utils.deprecation import (
    deprecated,
    make_deprecated_module_getattr,
    warn_deprecated,
)
from tinker_cookbook.utils.git_rev import git_output, recipe_user_metadata
from tinker_cookbook.utils.lr_scheduling import compute_schedule_lr_multiplier
from tinker_cookbook.utils.progress import ProgressReporter, format_seconds
from tinker_cookbook.utils.session_naming import (
    default_cookbook_session_name,
    resolve_session_display_name,
    slugify,
)


def test_linear_falls_evenly_and_never_reaches_zero():
    factors = [compute_schedule_lr_multiplier("linear", step, 4) for step in range(4)]
    assert factors == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_down_in_the_middle():
    assert compute_schedule_lr_multiplier("cosine", 0, 10) == 1.0
    assert compute_schedule_lr_multiplier("cosine", 5, 10) == pytest.approx(0.5)
    assert 0 < compute_schedule_lr_multiplier("cosine", 9, 10) < 0.05


def test_warmup_rises_to_the_peak_and_the_rest_falls_from_it():
    factors = [
        compute_schedule_lr_multiplier("linear", step, 7, warmup_steps=3) for step in range(7)
    ]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
    assert compute_schedule_lr_multiplier("constant", 6, 7, warmup_steps=3) == 1.0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigurationError, match="linear, cosine, constant"):
        compute_schedule_lr_multiplier("square", 0, 1)  # pyright: ignore[reportArgumentType]


def test_dict_mean_averages_what_is_there():
    assert misc_utils.dict_mean([{"a": 1, "b": None}, {"a": 3}, {"b": 5}]) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize(("length", "pieces"), [(10, 3), (3, 3), (7, 1), (8, 4)])
def test_split_list_makes_pieces_of_nearly_equal_length(length: int, pieces: int):
    parts = misc_utils.split_list(range(length), pieces)
    assert misc_utils.concat_lists(parts) == list(range(length))
    assert len(parts) == pieces
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_split_list_refuses_more_pieces_than_elements():
    with pytest.raises(ConfigurationError, match="num_splits=3"):
        misc_utils.split_list([1, 2], 3)


def test_lookup_func_finds_by_colon_dot_and_default_module():
    assert misc_utils.lookup_func("math:sqrt")(9) == 3
    assert misc_utils.lookup_func("math.sqrt")(9) == 3
    assert misc_utils.lookup_func("sqrt", "math")(9) == 3
    with pytest.raises(ConfigurationError, match="squirt"):
        misc_utils.lookup_func("math:squirt")
    with pytest.raises(ConfigurationError, match="no module"):
        misc_utils.lookup_func("sqrt")


def test_the_other_small_functions():
    assert list(misc_utils.safezip([1], [2])) == [(1, 2)]
    with pytest.raises(ValueError, match="longer"):
        list(misc_utils.safezip([1], [2, 3]))
    assert misc_utils.all_same([])
    assert misc_utils.all_same([1, 1])
    assert not misc_utils.all_same([1, 2])
    assert misc_utils.not_none(0) == 0
    with pytest.raises(AssertionError):
        misc_utils.not_none(None)
    assert misc_utils.iteration_dir("run", 7) == Path("run/iteration_000007")
    assert misc_utils.iteration_dir(None, 7) is None
    metrics: dict[str, float] = {}
    with misc_utils.timed("nap", metrics):
        time.sleep(0.01)
    assert metrics["time/nap"] >= 0.01


def test_names():
    assert slugify("HuggingFaceTB/SmolLM2-135M Instruct!") == "huggingfacetb-smollm2-135m-instruct"
    assert default_cookbook_session_name("sl_basic", None, "Qwen/Qwen3-8B") == (
        "sl-basic-qwen-qwen3-8b"
    )
    assert resolve_session_display_name(session_name=None, wandb_name="w") == "w"
    assert resolve_session_display_name(session_name="s", wandb_name="w") == "s"


def test_deprecated_names_warn_and_still_work():
    @deprecated(message="Use new.")
    def old(x: int) -> int:
        return x + 1

    with pytest.warns(DeprecationWarning, match=r"old is deprecated\. Use new\."):
        assert old(1) == 2

    @deprecated
    class Old:
        def __init__(self, x: int) -> None:
            self.x = x

    with pytest.warns(DeprecationWarning, match="Old is deprecated"):
        assert Old(3).x == 3


def test_a_name_whose_time_is_over_fails():
    with pytest.raises(RuntimeError, match=r"removed in version 0\.0\.1"):
        warn_deprecated("old", removal_version="0.0.1")
    with pytest.warns(DeprecationWarning, match="version 999"):
        warn_deprecated("old", removal_version="999")


def test_moved_names_are_forwarded():
    lookup = make_deprecated_module_getattr("old.place", {"root": ("math.sqrt", None)})
    with pytest.warns(DeprecationWarning, match=r"Use math\.sqrt"):
        assert lookup("root")(4) == 2
    with pytest.raises(AttributeError):
        lookup("other")


def test_git_state_of_a_repository_and_outside_one(tmp_path: Path, monkeypatch):
    assert git_output("rev-parse", "HEAD", folder=tmp_path) is None
    monkeypatch.chdir(tmp_path)
    assert recipe_user_metadata("r") == {"recipe_name": "r"}
    commit = ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "first"]
    module = tmp_path / "a_module_for_the_test.py"
    module.write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "."], commit):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    module.write_text("x = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    state = code_state(["a_module_for_the_test"])
    assert "-x = 1\n+x = 2\n" in state
    assert recipe_user_metadata("r")["git_rev"] in state


def test_spans_are_collected_inside_a_window(tmp_path: Path):
    @trace.scope
    async def work() -> int:
        await asyncio.sleep(0.01)
        return 1

    @trace.scope
    def sync_work() -> None:
        time.sleep(0.01)

    async def step() -> trace.IterationWindow:
        with trace.trace_iteration(3) as window:
            assert await work() == 1
            sync_work()
            async with trace.scope_span("inner"):
                pass
        await work()  # outside the window
        return window

    window = asyncio.run(step())
    assert [span["name"] for span in window.get_span_dicts()] == ["work", "sync_work", "inner"]
    metrics = window.get_timing_metrics()
    assert metrics["time/work"] >= 0.01
    assert metrics["time/total"] >= metrics["time/work"] + metrics["time/sync_work"]
    window.write_spans_jsonl(tmp_path / "spans.jsonl", 3)
    assert '"step": 3' in (tmp_path / "spans.jsonl").read_text()


def test_spans_go_to_a_trace_and_a_chart(tmp_path: Path):
    trace.trace_init(output_file=str(tmp_path / "events.jsonl"))
    with trace.trace_iteration(1) as window, trace.scope_span_sync("<a>"):
        time.sleep(0.01)
    with trace.scope_span_sync("outside a window"):
        pass
    trace.trace_shutdown()
    with trace.scope_span_sync("too late"):
        pass
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events] == ["<a>", "outside a window"]
    assert events[0]["ph"] == "X"
    assert events[0]["dur"] >= 10_000
    trace.save_gantt_chart_html(window, 1, tmp_path / "deep" / "chart.html")
    page = (tmp_path / "deep" / "chart.html").read_text()
    assert "&lt;a&gt;" in page
    assert "Step 1" in page


def test_spans_carry_attributes(tmp_path: Path):
    @trace.scope
    async def work(number: int) -> None:
        trace.update_scope_context({"number": number})
        await asyncio.sleep(0)
        with trace.scope_span_sync("inner"):
            trace.update_scope_context({"path": tmp_path})
        assert trace.get_scope_context().attributes == {"number": number}

    async def work_twice() -> None:
        await asyncio.gather(work(1), work(2))

    trace.update_scope_context({"nowhere": 1})
    assert trace.get_scope_context().attributes == {}
    trace.trace_init(output_file=str(tmp_path / "events.jsonl"))
    asyncio.run(work_twice())
    trace.trace_shutdown()
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    outer = [event["args"] for event in events if event["name"] == "work"]
    inner = [event["args"] for event in events if event["name"] == "inner"]
    assert outer == [{"number": 1}, {"number": 2}]
    assert inner == [{"path": str(tmp_path)}] * 2


def test_progress_in_a_pipe_is_plain_lines():
    stream = io.StringIO()
    progress = ProgressReporter(3, stream=stream)
    for step in range(3):
        metrics = {"train_mean_nll": 2.0 - step, "num_tokens": 100, "learning_rate": 1e-3}
        progress.step(metrics | ({"test/nll": 1.5} if step == 1 else {}))
    progress.message("done")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/3  loss 2.0000  lr 1.0e-03")
    assert "held-out 1.5000" in lines[1]
    assert "left" in lines[1]
    assert lines[2].startswith("step 3/3")
    assert "left" not in lines[2]
    assert lines[3] == "done"
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_a_bar():
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with os.fdopen(slave, "w") as stream:
        progress = ProgressReporter(2, 1, stream=stream)
        progress.message("hello")
        progress.step({"train_mean_nll": 2.0, "num_tokens": 100})
        progress.close()
    received = b""
    with contextlib.suppress(OSError):  # a terminal that is closed ends with an error
        while piece := os.read(master, 4096):
            received += piece
    os.close(master)
    text = received.decode()
    assert "hello" in text
    assert "1/2 [" in text
    assert "2/2 [" in text
    assert "loss 2.0000" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4s"), (75, "1m 15s"), (3725, "1h 02m"), (59.7, "1m 00s")]
)
def test_format_seconds(seconds: float, text: str):
    assert format_seconds(seconds) == text
