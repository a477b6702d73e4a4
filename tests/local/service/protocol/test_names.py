"""Checkpoint names, paths and times to live."""

import pytest

from tinker_cookbook.local.errors import UserError
from tinker_cookbook.local.service.protocol.paths import (
    check_name,
    check_ttl,
    parse_tinker_path,
)
from tinker_cookbook.utils.shared_limits import MAX_TTL_SECONDS


@pytest.mark.parametrize("name", ["a", "000010", "step-3", "final_v1.2", "a=1,b=2", "x" * 200])
def test_plain_names_are_accepted(name: str) -> None:
    assert check_name(name) == name


BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "a\0", "a b", "a?b", "a#b", "a%2fb", ".x", "-x"]
BAD_NAMES += ["a..b", "x" * 201, "ä", "a\n"]
BAD_PATHS = ["", "tinker://", "final", "http://a/weights/b", "tinker://a/weights", "tinker://a/b/c"]
BAD_PATHS += ["tinker://a/weights/b/c", "tinker://../weights/b", "tinker://a/weights/.."]
BAD_PATHS += ["tinker:///weights/b", "tinker://a/weights/", "tinker://a b/weights/c", "/etc/passwd"]
BAD_PATHS += ["file:///etc/passwd", "tinker://a/weights/b%2f..", "tinker://a\0/weights/b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="checkpoint name"):
        check_name(name)


def test_paths_parse_and_print_back() -> None:
    path = parse_tinker_path("tinker://5f:train:0/weights/final")
    assert (path.run_id, path.segment, path.name) == ("5f:train:0", "weights", "final")
    assert str(path) == "tinker://5f:train:0/weights/final"


@pytest.mark.parametrize("path", BAD_PATHS)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(UserError, match="path="):
        parse_tinker_path(path)


@pytest.mark.parametrize("ttl", [None, 3600, MAX_TTL_SECONDS])
def test_times_to_live_in_range_are_accepted(ttl: int | None) -> None:
    assert check_ttl(ttl) == ttl


@pytest.mark.parametrize("ttl", [5, 0, -1, 3599, MAX_TTL_SECONDS + 1])
def test_times_to_live_out_of_range_are_refused(ttl: int) -> None:
    with pytest.raises(UserError, match=f"ttl_seconds={ttl} "):
        check_ttl(ttl)
