"""Every behaviour of the protocol has a test, and an older SDK finds the same service."""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import ast
import datetime
import io
import os
import tarfile
import urllib.request
from pathlib import Path

import pytest
import tinker

from tests.conftest import OLD_SDK
from tests.e2e.protocol_table import BEHAVIOURS, OLDER, ids_in, install, outcome_of, run_tests
from tests.e2e.sdk import batch, train_step

HERE = Path(__file__).parent


def test_every_behaviour_has_a_test() -> None:
    shown: set[str] = set()
    for path in HERE.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                shown.update(ids_in(node.name))
    assert shown >= set(BEHAVIOURS)


@pytest.mark.skipif(OLD_SDK not in os.environ, reason="this SDK has no archive downloads")
def test_archives_through_the_sdk_that_has_them(new_run, rest) -> None:
    run = new_run()
    train_step(run, batch())
    path = run.save_state("archive").result().path
    with pytest.warns(FutureWarning, match="archive"):
        answer = rest.get_checkpoint_archive_url_from_tinker_path(path).result()
    assert isinstance(answer, tinker.types.CheckpointArchiveUrlResponse)
    assert answer.expires > datetime.datetime.now(datetime.UTC)
    with (
        urllib.request.urlopen(answer.url) as reply,
        tarfile.open(fileobj=io.BytesIO(reply.read())) as tar,
    ):
        names = set(tar.getnames())
    assert names == {"adapter_config.json", "adapter_model.safetensors", "checkpoint_complete"}
    _, run_id, segment, name = path.replace("//", "/").split("/")
    with pytest.warns(FutureWarning, match="archive"):
        again = rest.get_checkpoint_archive_url(run_id, f"{segment}/{name}").result()
    assert again.url.startswith("http")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(1800)
def test_the_older_sdk_finds_everything_that_it_knows(tmp_path: Path) -> None:
    """All tests of this folder with the older SDK; what it cannot say is skipped, nothing fails."""
    outcomes = run_tests(install(OLDER, tmp_path / "sdk"), tmp_path / "report.xml")
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    assert failed == []
    passed = [name for name in BEHAVIOURS if outcome_of(name, outcomes) == "passed"]
    assert len(passed) >= 167
    assert any("test_archives_through" in t and o == "passed" for t, o in outcomes.items())
