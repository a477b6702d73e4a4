"""Which test shows which behaviour of the protocol, and how it ends with each version of the SDK.

    python -m tests.e2e.protocol_table                     # the installed SDK and 0.35.0
    python -m tests.e2e.protocol_table --sdk installed     # one of them

A behaviour has an id such as SVC-01; the tests that show it carry it in their name
(`test_svc_01_...`, `test_ckp_12_and_13_...`). Older SDKs are fetched from PyPI into a folder and
put before the installed one; the service always runs with the installed one.
"""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import OLD_SDK

__all__ = ["BEHAVIOURS", "ids_in", "run_tests"]

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = "installed"
OLDER = "0.35.0"
_COUNTS = {"SVC": 22, "TRN": 12, "NUM": 12, "OPT": 17, "LOS": 17, "ORD": 8, "ASY": 5, "SMP": 36}
_COUNTS |= {"CKP": 23, "CLI": 7, "ERR": 27}
BEHAVIOURS = [f"{kind}-{n:02d}" for kind, count in _COUNTS.items() for n in range(1, count + 1)]
"""Service, training runs, numerics, optimizer, losses, order, async, sampling, checkpoints, command
line, errors."""
_RANK = {"failed": 0, "passed": 1, "skipped": 2, "-": 3}


def ids_in(name: str) -> list[str]:
    """The behaviours that a test's name speaks of.

    `test_smp_20_to_22_x` names three, `test_trn_06_and_err_20_x` two.
    """
    found: list[str] = []
    kind, joined = "", ""
    for word in name.removeprefix("test_").split("_"):
        if word.upper() in _COUNTS:
            kind, joined = word.upper(), ""
        elif kind and re.fullmatch(r"\d\d", word):
            first = int(word)
            if joined == "to":
                first = int(found[-1][-2:]) + 1
            found += [f"{kind}-{number:02d}" for number in range(first, int(word) + 1)]
        elif word in ("and", "to") and found:
            joined = word
        else:
            break
    return found


def install(version: str, folder: Path) -> Path:
    """Fetch a version of the SDK without its dependencies, which the installed one has too."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*command, str(folder), f"tinker=={version}"], check=True)
    return folder


def run_tests(sdk: Path | None, report: Path, *arguments: str) -> dict[str, str]:
    """Run the tests of this folder; returns the outcome of each, parameters included.

    Args:
        sdk: folder of an older SDK; None uses the installed one.
    """
    environment = dict(os.environ)
    if sdk is not None:
        environment |= {"PYTHONPATH": str(sdk), OLD_SDK: str(sdk)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", "-m", "not network and not gpu"]
    command += arguments or ["tests/e2e", "--ignore=tests/e2e/test_skyrl.py"]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return dict(_read(report))


def _read(report: Path) -> Iterator[tuple[str, str]]:
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        failed = tags & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in tags else "passed"
        yield f"{case.get('classname')}::{case.get('name')}", outcome


def outcome_of(behaviour: str, outcomes: dict[str, str]) -> str:
    """`failed` if any test of a behaviour failed, `skipped` if none ran, `-` if there is none."""
    found = [o for test, o in outcomes.items() if behaviour in ids_in(_bare(test))]
    return min(found, key=_RANK.__getitem__, default="-")


def _bare(test: str) -> str:
    return test.rpartition("::")[2].partition("[")[0]


def tests_of(behaviour: str, outcomes: dict[str, str]) -> list[str]:
    """Names of the tests of a behaviour, without parameters."""
    names = (_bare(test) for test in outcomes)
    return list(dict.fromkeys(name for name in names if behaviour in ids_in(name)))


def main() -> int:
    """Print the table; 1 unless every behaviour passes with every version that has it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sdk", action="append", help="version, or 'installed'; repeat")
    versions = parser.parse_args().sdk or [INSTALLED, OLDER]
    outcomes: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for version in versions:
            sdk = None if version == INSTALLED else install(version, Path(folder) / version)
            outcomes[version] = run_tests(sdk, Path(folder) / f"{version}.xml")
    return print_table(outcomes)


def print_table(outcomes: dict[str, dict[str, str]]) -> int:
    """One line per behaviour, then totals."""
    print(f"{'id':<8}" + "".join(f"{version:<12}" for version in outcomes) + "tests")
    everything = {test: o for results in outcomes.values() for test, o in results.items()}
    complete = True
    for behaviour in BEHAVIOURS:
        row = [outcome_of(behaviour, results) for results in outcomes.values()]
        complete = complete and "passed" in row and not {"failed", "-"} & set(row)
        tests = ", ".join(tests_of(behaviour, everything))
        print(f"{behaviour:<8}" + "".join(f"{outcome:<12}" for outcome in row) + tests)
    for version, results in outcomes.items():
        totals = [outcome_of(behaviour, results) for behaviour in BEHAVIOURS]
        print(
            f"{version}: "
            + ", ".join(f"{totals.count(name)} {name}" for name in _RANK if name in totals)
            + f" of {len(BEHAVIOURS)} behaviours; {len(results)} tests"
        )
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
