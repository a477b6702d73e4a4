"""docs/rl.md: its code runs, and it begins with what to write and what one sees."""

import re
from pathlib import Path

from recipes import rl_basic

PAGE = (Path(__file__).parents[2] / "docs/rl.md").read_text(encoding="utf-8")


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
        assert hasattr(rl_basic, name) or hasattr(rl_basic.WordCountEnv, name)


def test_what_to_write_and_to_see_come_before_measurements():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles[:2] == ["What you write", "What you see"]
    assert titles[-1] == "Recorded runs"
