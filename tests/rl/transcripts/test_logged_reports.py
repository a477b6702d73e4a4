"""What environments log with logtree: kept with their group, written next to the transcripts."""

# pyright: reportIndexIssue=false

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

from tests.assets import load_tokenizer
from tests.rl.envs import EchoEnv, EnvsBuilder, ScriptedPolicy
from tinker_cookbook.display import format_trajectory
from tinker_cookbook.rl import train
from tinker_cookbook.rl.rollout_logging import RolloutSummaryExportConfig, RolloutSummaryGroup
from tinker_cookbook.rl.rollouts import do_group_rollout
from tinker_cookbook.rl.transcripts.page import write_transcripts
from tinker_cookbook.rl.types import TrajectoryGroup
from tinker_cookbook.utils import logtree


def log_turn(turn: int) -> None:
    with logtree.scope_header(f"Turn {turn}"):
        logtree.log_text("it said <hi>")


def roll_out(**settings) -> TrajectoryGroup:
    builder = EnvsBuilder(lambda _: EchoEnv(**settings), group_size=2)
    return asyncio.run(do_group_rollout(builder, ScriptedPolicy()))


def write(folder: Path, *groups: TrajectoryGroup, shown: int = 4) -> None:
    export = RolloutSummaryExportConfig(
        "train", 3, "train", folder=folder, tokenizer=load_tokenizer("qwen3")
    )
    items = [RolloutSummaryGroup(group, [f"kind {i}"]) for i, group in enumerate(groups)]
    write_transcripts(export, items, num_groups_on_page=shown)


def test_what_is_logged_is_a_page_and_a_tree(tmp_path: Path):
    groups = [roll_out(on_step=log_turn, num_turns=2), roll_out(), roll_out(on_step=log_turn)]
    write(tmp_path, pickle.loads(pickle.dumps(groups[0])), *groups[1:], shown=2)
    page = (tmp_path / "train_logtree.html").read_text("utf-8")
    assert page.count("it said &lt;hi&gt;") == 4  # two members, two turns; the third is not shown
    tree = json.loads((tmp_path / "train_logtree.json").read_text("utf-8"))
    assert tree["title"] == "train, step 3"
    [_, section] = tree["root"]["children"]
    assert section["children"][0] == {"tag": "h2", "children": ["Group 0: kind 0"]}
    assert section["children"][1]["children"][0] == {"tag": "h3", "children": ["Turn 0"]}
    assert 'href="train_logtree.html"' in (tmp_path / "train.html").read_text("utf-8")


def test_without_a_word_there_is_no_file(tmp_path: Path):
    write(tmp_path, roll_out())
    assert {path.name for path in tmp_path.iterdir()} == {
        "train.html",
        "train_rollout_summaries.jsonl",
        "train_tokens.jsonl",
    }
    assert "logtree" not in (tmp_path / "train.html").read_text("utf-8")


def test_in_a_report_of_the_programs_own_groups_are_sections_of_it():
    with logtree.init_trace("mine") as trace:
        group = roll_out(on_step=log_turn)
        with logtree.scope_disable():
            silent = roll_out(on_step=log_turn)
    assert group.report is None
    assert silent.report is not trace
    [_, section] = trace.to_dict()["root"]["children"]
    assert section["children"][0]["children"] == ["Group Rollout"]
    assert len(section["children"]) == 3


def test_a_group_is_printed(capsys):
    group = roll_out()
    train.print_group(group, load_tokenizer("qwen3"))
    printed = capsys.readouterr().out
    assert printed.count("total reward 1") == 2
    assert printed.count("==== completed") == 2


def test_coroutines_are_gathered_in_their_order(capsys):
    async def work(number: int) -> int:
        await asyncio.sleep(0.01 / (number + 1))
        return number

    assert asyncio.run(train.gather_with_progress(map(work, range(3)), "work")) == [0, 1, 2]
    assert "work: 100%" in capsys.readouterr().err


def test_a_trajectory_as_text():
    [trajectory, _] = roll_out(num_turns=2).trajectories_G
    tokenizer = load_tokenizer("qwen3")
    text = format_trajectory(trajectory, tokenizer)
    for part in ("turn 1 of 2: 3 tokens of prompt", "reply: 2 tokens", "reward 1, episode done"):
        assert part in text
    assert text.endswith("==== completed")
    last = format_trajectory(trajectory, tokenizer, only_last_transition=True)
    assert "turn 1 of 2" not in last
    assert "turn 2 of 2" in last
    assert "score: 2" in last
