"""Changed code of a recipe is noticed; changed comments and texts are not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.recipe_process import ROOT
from tinker_cookbook.utils.recipe_code import CODE_FILE

PROGRAM = '''"""A recipe."""
import chz
import helper

@chz.chz
class Config:
    """Settings."""
    rate: float = chz.field(default=1.0, doc="How fast.")

def reward(reply):
    """Long replies are good."""
    return len(reply)  # characters

if __name__ == "__main__":
    import sys
    from pathlib import Path
    from tinker_cookbook.utils import recipe_code
    print(*recipe_code.code_differences(Path(sys.argv[1])), sep="\\n")
    recipe_code.write_code(Path(sys.argv[1]))
'''


def run_program(path: Path, folder: Path, *options: str, cwd: Path | None = None) -> list[str]:
    words = options or (str(path),)
    done = subprocess.run(
        [sys.executable, *words, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT)},
    )
    return done.stdout.split("\n")[:-1]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("FACTOR = 2\n")
    (tmp_path / "unused.py").write_text("X = 1\n")
    path = tmp_path / "recipe.py"
    path.write_text(PROGRAM)
    assert run_program(path, tmp_path) == [""]
    return path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# characters", "# as many as there are"),
        ('"""Long replies are good."""', '"""Longer is better."""'),
        ('"""Settings."""', '"""All settings."""'),
        ('doc="How fast."', 'doc="Speed."'),
        ("return len(reply)", "return len(\n        reply\n    )"),
    ],
)
def test_what_does_nothing_may_change(program: Path, old: str, new: str):
    assert old in PROGRAM
    program.write_text(PROGRAM.replace(old, new))
    assert run_program(program, program.parent) == [""]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("len(reply)", "-len(reply)", "the code of recipe.py has changed: reward"),
        ("default=1.0", "default=2.0", "the code of recipe.py has changed: Config"),
        ("import chz", "import chz\nX = 1", "recipe.py has changed: what stands outside"),
        ("def reward", "def bonus", "the code of recipe.py has changed: reward, bonus"),
    ],
)
def test_changed_code_is_named(program: Path, old: str, new: str, line: str):
    program.write_text(PROGRAM.replace(old, new))
    [shown] = run_program(program, program.parent)
    assert line in shown
    assert run_program(program, program.parent) == [""]  # the new code is on record now


def test_files_that_the_recipe_imports_from_its_folder_count(program: Path):
    (program.parent / "unused.py").write_text("X = 2\n")
    assert run_program(program, program.parent) == [""]
    (program.parent / "helper.py").write_text("FACTOR = 3\n")
    [shown] = run_program(program, program.parent)
    assert shown.startswith("the code of helper.py has changed: ")


def test_a_package_counts_as_a_whole(program: Path):
    package = program.parent / "package"
    package.mkdir()
    (package / "__main__.py").write_text(PROGRAM.replace("import helper", "from . import envs"))
    (package / "envs.py").write_text("def step(): return 1\n")
    for options in (("-m", "package"), ("-m", "package")):
        assert run_program(package, package, *options, cwd=program.parent) == [""]
    (package / "envs.py").write_text("def step(): return 2\n")
    shown = run_program(package, package, "-m", "package", cwd=program.parent)
    assert shown == ["the code of envs.py has changed: step"]


def test_a_recipe_under_another_name_is_the_same_code(program: Path):
    other = program.rename(program.with_name("mine.py"))
    assert run_program(other, program.parent) == [""]


def test_programs_that_are_no_files_are_not_compared(program: Path):
    code = program.read_text()
    (program.parent / CODE_FILE).unlink()
    assert run_program(program, program.parent, "-c", code, cwd=program.parent) == [""]
    assert not (program.parent / CODE_FILE).exists()


def test_another_version_of_python_is_not_compared(program: Path):
    record = program.parent / CODE_FILE
    record.write_text(record.read_text().replace('"python": "3', '"python": "2'))
    program.write_text(PROGRAM.replace("len(reply)", "0"))
    assert run_program(program, program.parent) == [""]


def test_a_damaged_record_is_no_obstacle(program: Path):
    (program.parent / CODE_FILE).write_text("{")
    assert run_program(program, program.parent) == [""]
