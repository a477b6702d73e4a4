"""Compilation of the kernels with compilers that do not know every instruction."""

from __future__ import annotations

import logging
import shutil
import stat
from concurrent.futures import Future
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
