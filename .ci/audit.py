"""Look at the installed dependencies: the lock, the bounds, and known weaknesses.

    python .ci/audit.py PYPROJECT LOCK      # run by the interpreter of the environment to look at

Every distribution must be installed in the version of the lock, and that must be one that the
package accepts. Then pip-audit, in an environment of its own, asks the OSV advisory service. Where
that cannot be asked, a line says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

ADVISORIES = "https://api.osv.dev/v1/query"
KNOWN = {"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "20.0"}
"""A release that is known to be weak: a service that lists nothing for it cannot be relied on."""
SECONDS = 10


def main() -> int:
    project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
    problems = [f"out of bounds: {problem}" for problem in out_of_bounds(project)]
    problems += [
        f"out of lock: {problem}; renew it with 'bash .ci/lock'"
        for problem in out_of_lock(Path(sys.argv[2]), project["name"])
    ]
    for problem in problems:
        print(problem)
    if not problems:
        print("installed dependencies are those of the lock and satisfy the declared bounds")
    return audit() or bool(problems)


def out_of_lock(lock: Path, project: str) -> list[str]:
    """List the installed distributions that the lock does not name in that version."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if "==" in line]
    locked = {
        canonicalize_name(requirement.name): requirement.specifier
        for requirement in map(Requirement, lines)
        if requirement.marker is None or requirement.marker.evaluate()
    }
    problems = []
    for found in distributions():
        name = canonicalize_name(found.name)
        if name in {canonicalize_name(project), "pip", "setuptools"}:
            continue
        if name not in locked:
            problems.append(f"{name} {found.version} is not in {lock.name}")
        elif not locked[name].contains(found.version, prereleases=True):
            problems.append(f"{name} {found.version} is installed, {lock.name} has {locked[name]}")
    return sorted(problems)


def out_of_bounds(project: dict) -> list[str]:
    """List the dependencies of the base and of `dev` whose installed version is not accepted."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in project["dependencies"]]
    extras = ["dev"]
    for extra in extras:  # grows while it is read: `dev` names others
        for text in project["optional-dependencies"][extra]:
            requirement = Requirement(text)
            if requirement.name == project["name"]:
                extras += sorted(requirement.extras)
            else:
                wanted.append(requirement)
    problems = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement} is not installed")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement} has {found}")
    return problems


def audit() -> int:
    """Run pip-audit over this environment; 0 also where it cannot be asked."""
    try:
        request = urllib.request.Request(ADVISORIES, json.dumps(KNOWN).encode())
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            advisories = json.load(answer).get("vulns")
    except (OSError, ValueError) as error:
        print(f"pip-audit is left out: the advisory service does not answer ({error})")
        return 0
    if not advisories:
        print("pip-audit is left out: the advisory service does not know a release that is weak")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        frozen = subprocess.check_output(
            [sys.executable, "-m", "pip", "freeze", "--exclude-editable"], text=True
        )
        # a local build, such as a CPU one, is audited as the release it was made from
        lines = [line.partition("+")[0] for line in frozen.splitlines() if "==" in line]
        listed = Path(folder, "installed.txt")
        listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        subprocess.check_call([sys.executable, "-m", "venv", f"{folder}/venv"])
        python = f"{folder}/venv/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.call([*install, "pip-audit>=2.9,<3"]):
            print("pip-audit is left out: it cannot be installed here")
            return 0
        command = [python, "-m", "pip_audit", "--service", "osv", "--no-deps", "--disable-pip"]
        return subprocess.call([*command, "--requirement", str(listed)])


if __name__ == "__main__":
    sys.exit(main())
