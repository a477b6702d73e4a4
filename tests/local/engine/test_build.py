"""Compilation of the kernels with compilers that do not know every instruction."""

from __future__ import annotations

import logging
import shutil
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tinker_cookbook.local.engine.native import build

_SOURCE = ("adam.c",)


@pytest.fixture
def _old_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that refuses AMX, as GCC 10 does."""
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler here")
    script = tmp_path / "old-cc"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {tmp_path}/calls\n'
        'case "$*" in *-mamx-tile*) echo "cc: error: unrecognized option -mamx-tile" >&2; exit 1;; '
        f'esac\nexec {shutil.which(compiler)} "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(script))


def _library(*wanted: tuple[str, ...]) -> Path | None:
    result: Future[Path | None] = Future()
    build._run_build(result, list(wanted), _SOURCE)
    return result.result()


@pytest.mark.usefixtures("_old_compiler")
def test_flags_that_the_compiler_does_not_know_are_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        library = _library(("-mamx-tile",), ())
    assert library is not None
    assert library.exists()
    assert "unrecognized option -mamx-tile); trying without AMX" in caplog.text
    library.unlink()


@pytest.mark.usefixtures("_old_compiler")
def test_without_any_flags_that_work_there_is_no_library(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert _library(("-mamx-tile",)) is None
    assert "torch is used instead" in caplog.text


@pytest.mark.usefixtures("_old_compiler")
def test_what_two_need_at_once_is_compiled_once(tmp_path: Path) -> None:
    """A lock on the folder makes the second one wait; it holds between processes, too."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: _library(()), range(2))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len([call for call in calls if " -c " in call]) == 1
    assert first == second
    assert first is not None
    first.unlink()
