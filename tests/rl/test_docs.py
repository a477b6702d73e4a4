"""docs/rl.md: its code runs, its tables agree with the code, and its order is kept."""

import re
from pathlib import Path

from recipes import rl_basic
from tinker_cookbook.rl.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/rl.md").read_text(encoding="utf-8")


def test_the_reward_of_the_example():
    [block] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/rl.md", "exec"), names)
    reward = names["letter_reward"]
    assert reward("Soft snow sings", "snow") == 1.0
    assert reward("Snow is cold", "snow") == 1 / 3
    assert reward("", "snow") == 0.0


def test_the_names_to_change_are_in_the_recipe():
    rows = re.search(r"\| in `rl_basic.py` \|.*?\n\n", PAGE, re.DOTALL)
    assert rows is not None
    first_column = re.findall(r"^\| (`.*?) \|", rows.group(), re.MULTILINE)
    for name in re.findall(r"`(\w+)`", " ".join(first_column)):
        assert hasattr(rl_basic, name)


def test_the_table_of_algorithms_is_that_of_the_code():
    table = re.search(r"^\| name \| baseline.*?\n\n", PAGE, re.M | re.S)
    assert table is not None
    rows = [[cell.strip() for cell in row.split("|")] for row in table.group().split("\n")[2:-2]]
    assert len(rows) == len(ALGORITHMS)
    for row, (name, algorithm) in zip(rows, ALGORITHMS.items(), strict=True):
        settings = (algorithm.loss_fn_config or {}).items()
        assert row[1].split()[0] == f"`{name}`"
        assert row[2:7] == [
            algorithm.advantage_estimator,
            algorithm.length_normalization,
            algorithm.loss_fn,
            ", ".join(f"`{key}={value:g}`" for key, value in settings),
            algorithm.source,
        ]


def test_every_module_is_in_the_table_of_parts():
    parts = re.search(r"^## The parts\n.*?\n\n\[", PAGE, re.M | re.S)
    assert parts is not None
    named = set(re.findall(r"`(\w+)/?`", re.sub(r"\|[^|]*\|$", "|", parts.group(), flags=re.M)))
    modules = {path.stem for path in (ROOT / "tinker_cookbook/rl").glob("[a-z]*") if path.stem}
    assert modules <= named, modules - named


def test_what_to_write_and_to_see_come_first():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles[:2] == ["What you write", "What you see"]
