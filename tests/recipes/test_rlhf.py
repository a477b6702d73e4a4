"""The RLHF pipeline: its stages, what each starts from, its guards, and kills at any moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.preference.rlhf import __main__ as rlhf
from recipes.preference.rlhf import opinions
from recipes.preference.rlhf.manifest import Manifest, StageRecord
from tests.conftest import ServiceProcess
from tests.recipes.recipe_process import (
    ForkedRecipes,
    count_lines,
    metric_rows,
    recipe_environment,
    run_in_this_process,
)
from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.preference.sampled_comparisons import SampledReply
from tinker_cookbook.utils.jsonl_log import read_rows

PROMPT = opinions.build_conversation("What do you think of owls?")
STAGES = ("sft", "rm_pairwise", "rl")


def reply(text: str, *, has_ended: bool = True) -> SampledReply:
    return SampledReply(text, has_ended, 5)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("I like owls because they are calm.", 3 / 3),
        ("I like them because they are calm.", 2 / 3),
        ("I like owls.", 2 / 3),
        ("I like owls because they are calm. I see them often.", 2 / 3),
        ("They are calm. They are old.", 0.0),
        ("because", 0.0),
        ("", 0.0),
    ],
)
def test_the_rule_counts_topic_reason_and_one_sentence(text: str, reward: float):
    assert opinions.rule_reward(PROMPT, reply(text)) == pytest.approx(reward)


def test_a_sentence_that_is_cut_off_is_not_whole():
    cut = reply("I like owls because they are calm.", has_ended=False)
    assert opinions.rule_reward(PROMPT, cut) == pytest.approx(2 / 3)


def test_the_annotator_knows_what_matters_and_else_prefers_length():
    short, long = "I like owls.", "I like owls. They are calm. I see them often."
    reasoned = "I like owls because they are calm."
    assert opinions.annotate(PROMPT, short, reasoned) == "B"
    assert opinions.annotate(PROMPT, reasoned, long) == "A"
    assert opinions.annotate(PROMPT, short, long) == "B"
    assert opinions.annotate(PROMPT, "I like owls.", "I love owls.") == "Tie"
    assert opinions.rule_reward(PROMPT, reply(short)) > opinions.rule_reward(PROMPT, reply(long))


def test_held_out_topics_are_asked_nowhere_else():
    trained = {str(m[0]["content"]) for m in opinions.ask(opinions.TRAINED, 4)}
    examples = {str(m[0]["content"]) for m in opinions.draw_examples(200, 0)}
    held_out = {str(m[0]["content"]) for m in opinions.ask(opinions.HELD_OUT, 4)}
    assert not held_out & (trained | examples)
    assert opinions.find_topic(PROMPT) == "owls"


def write_files(folder: Path) -> tuple[Path, Path]:
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"Q{n}?"},
                {"role": "assistant", "content": "yes" if n % 2 else "no no"},
            ]
        }
        for n in range(12)
    ]
    pairs = [{"prompt": f"Q{n}?", "chosen": "yes", "rejected": "no no"} for n in range(10)]
    examples, comparisons = folder / "examples.jsonl", folder / "comparisons.jsonl"
    for path, rows in ((examples, talks), (comparisons, pairs)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return examples, comparisons


def words(service: ServiceProcess, folder: Path, log_path: Path, **changes: object) -> list[str]:
    examples, comparisons = write_files(folder)
    settings = {
        "model_name": service.model,
        "base_url": service.base_url,
        "renderer_name": "chatml",
        "log_path": log_path,
        "sft_data": examples,
        "comparisons": comparisons,
        "test_size": 4,
        "sft_steps": 3,
        "rm_steps": 4,
        "rl_steps": 3,
        "sft_batch_size": 2,
        "rm_batch_size": 2,
        "rl_groups_per_batch": 2,
        "rl_group_size": 3,
        "rl_max_tokens": 5,
        "lora_rank": 4,
        "rm_learning_rate": 1e-2,
        "min_judge_auc": 0,
        "save_every": 1,
        "eval_every": 2,
        **changes,
    }
    return [f"{key}={value}" for key, value in settings.items()]


@pytest.fixture
def service(local_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch) -> ServiceProcess:
    monkeypatch.setenv("TINKER_API_KEY", local_service.api_key)
    return local_service


def test_the_stages_run_one_by_one_and_take_what_the_one_before_left(
    service, tmp_path: Path, capsys
):
    log_path = tmp_path / "run"
    only = {"run_sft": False, "run_rm": False, "run_rl": False}
    for name in ("run_sft", "run_rm", "run_rl"):
        run_in_this_process(rlhf, words(service, tmp_path, log_path, **only | {name: True}))
    manifest = Manifest(log_path)
    sft, rm, rl = (manifest.get(stage) for stage in STAGES)
    assert sft is not None
    assert rm is not None
    assert rl is not None
    assert rm.inputs == {"replies_of": sft.sampler_path}
    assert rl.inputs == {
        "policy": sft.state_path,
        "reference": sft.sampler_path,
        "judge": rm.sampler_path,
    }
    [first, *_] = read_rows(log_path / "rl" / "metrics.jsonl")
    assert {"test/judge_win_rate", "test/reply_tokens", "kl_policy_base"} <= first.keys()
    assert "env/all/length_adjustment" in first
    assert json.loads((log_path / "rl" / "judge.json").read_text())["num_comparisons"] == 4
    assert "judge    accuracy " in capsys.readouterr().out
    before = metric_rows(log_path / "rl")
    run_in_this_process(rlhf, words(service, tmp_path, log_path))
    assert metric_rows(log_path / "rl") == before
    assert capsys.readouterr().out.count("already complete") == 3
    # The last stage with other settings, next to the first, with the same judge.
    free = {"rl_name": "rl_free", "length_method": "none", "kl_penalty_coef": 0, "rl_steps": 1}
    run_in_this_process(rlhf, words(service, tmp_path, log_path, **only | free | {"run_rl": True}))
    assert Manifest(log_path).get("rl_free") is not None
    assert Manifest(log_path).get("rl") == rl


def test_a_pointwise_judge_runs_the_tournament_too(service, tmp_path: Path):
    settings = words(service, tmp_path, tmp_path / "run", rm_kind="pointwise", rl_steps=1)
    run_in_this_process(rlhf, settings)
    assert Manifest(tmp_path / "run").get("rm_pointwise") is not None
    assert len(read_rows(tmp_path / "run" / "rl" / "metrics.jsonl")) == 2


def refusal(settings: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_in_this_process(rlhf, settings)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_poor_judge_is_refused_before_rl(service, tmp_path: Path, capsys):
    settings = words(service, tmp_path, tmp_path / "run", min_judge_auc=1.01)
    assert "AUC" in refusal(settings, capsys)
    assert not (tmp_path / "run" / "rl" / "metrics.jsonl").exists()
    assert Manifest(tmp_path / "run").get("rm_pairwise") is not None


def test_a_stage_takes_nothing_from_a_stranger(service, tmp_path: Path, capsys):
    log_path = tmp_path / "run"
    settings = words(service, tmp_path, log_path, run_sft=False, run_rm=False)
    assert "has no record of a pairwise reward model; train it first" in refusal(settings, capsys)
    # A judge of another policy, and checkpoints in the folder that no record names.
    manifest = Manifest(log_path)
    manifest.record("sft", StageRecord("a", "tinker://new/weights/f", "tinker://new/s/f"))
    other = StageRecord("b", "", "tinker://j/s/f", {"replies_of": "tinker://old/s/f"})
    manifest.record("rm_pairwise", other)
    message = refusal(settings, capsys)
    assert "used replies_of=tinker://old/s/f, and this pipeline now has" in message
    assert "tinker://new/s/f" in message


def test_a_manifest_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"manifest.json cannot be read"):
        Manifest(tmp_path)


def test_settings_that_cannot_work_are_refused(capsys):
    assert "rl_group_size=1 must be 2" in refusal(["rl_group_size=1"], capsys)
    assert "length_control.coef=2.0" in refusal(["length_method=residual", "length_coef=2"], capsys)


def test_replies_that_fill_the_context_are_refused_before_the_first_stage(
    tiny_model_folder: Path, tmp_path: Path, capsys
):
    settings = [f"model_name={tiny_model_folder}", "renderer_name=chatml", "base_url=local"]
    settings += [f"log_path={tmp_path / 'run'}", "rl_max_tokens=1024"]
    assert "rl_max_tokens=1024 leaves no room for a prompt" in refusal(settings, capsys)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_starts_nothing(tiny_model_folder: Path, tmp_path: Path, capsys):
    settings = [f"model_name={tiny_model_folder}", "renderer_name=chatml", "base_url=local"]
    run_in_this_process(rlhf, [*settings, f"log_path={tmp_path / 'run'}", "dry_run=true"])
    out = capsys.readouterr().out
    assert "rl: 12 steps of 24 replies of at most 32 tokens" in out
    assert "rows     224 sequences in 14 steps" in out
    assert not (tmp_path / "run").exists()


def moments(log_path: Path) -> dict[str, Callable[[], bool]]:
    """When to kill, in the order in which a pipeline comes by."""

    def rows(stage: str, count: int) -> Callable[[], bool]:
        return lambda: count_lines(log_path / stage / "metrics.jsonl") >= count

    def recorded(stage: str) -> Callable[[], bool]:
        return lambda: Manifest(log_path).get(stage) is not None

    return {
        "first stage begun": lambda: (log_path / "sft" / "config.json").exists(),
        "first stage trained, not recorded": rows("sft", 4),
        "first stage recorded": recorded("sft"),
        "judge in training": rows("rm_pairwise", 2),
        "judge recorded": recorded("rm_pairwise"),
        "policy in training": rows("rl", 1),
        "policy trained, not recorded": rows("rl", 4),
    }


def differences(one: Path, other: Path) -> list[tuple[object, ...]]:
    """Numbers that two runs do not share; what is cached depends on what ran before."""
    rows = metric_rows(one), metric_rows(other)
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    return [
        (a["step"], key, a.get(key), b.get(key))
        for a, b in zip(*rows, strict=True)
        for key in sorted(a.keys() | b.keys())
        if "cached" not in key
        # What runs at the same time decides the last digits.
        if a.get(key) != pytest.approx(b.get(key), rel=1e-3, abs=1e-4)
    ]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_an_unbroken_pipeline(
    service_factory, tiny_model_folder: Path, tmp_path: Path
):
    service = service_factory(tiny_model_folder)
    recipes = ForkedRecipes(recipe_environment(service, tmp_path / "home"), tmp_path / "output.log")
    module = "recipes.preference.rlhf.__main__"
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    recipes.run(module, *words(service, tmp_path, unbroken))
    command = words(service, tmp_path, broken)
    killed = {
        name: recipes.run_until(condition, module, *command)
        for name, condition in moments(broken).items()
    }
    assert sum(killed.values()) >= 5, killed
    recipes.run(module, *command)
    for stage in STAGES:
        assert differences(broken / stage, unbroken / stage) == [], stage
    manifest = Manifest(broken)
    sft, rm, rl = (manifest.get(stage) for stage in STAGES)
    assert sft is not None
    assert rm is not None
    assert rl is not None
    assert rl.inputs["policy"] == sft.state_path
    assert rl.inputs["judge"] == rm.sampler_path
