"""Make tables of the docs: the formats by name, and what was measured per family.

python -m tests.renderers.parity_table --formats        # write the table of formats into the docs
python -m tests.renderers.parity_table [GENERATED]      # print the counts of each family
python -m tests.renderers.parity_table --markdown [GENERATED]   # and write them into the docs

GENERATED is the number of generated conversations per family, 200 by default.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from tinker_cookbook.renderers import Message
from tinker_cookbook.renderers.built_in import BUILT_IN

from . import checks
from .conversations import Case, conversations, fixed_cases
from .families import FAMILIES, Family
from .test_injection import markers_of

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "renderers.md", DOCS / "measurements" / "renderers.md")
_MAX_MARKERS = 60
COLUMNS = (
    "family",
    "prompt = template",
    "conversation = template",
    "equal except for a documented difference",
    "trained = sampled",
    "reply parses back",
    "injection",
    "streams alike",
    "extends",
)


@dataclass
class Count:
    """How often a property held."""

    good: int = 0
    total: int = 0

    def add(self, held: bool) -> None:
        """Count one case."""
        self.good += held
        self.total += 1

    def __str__(self) -> str:
        return f"{self.good}/{self.total}"


def generated_cases(family: Family, count: int) -> list[Case]:
    """Return conversations that hypothesis makes, the same on every run."""
    cases: list[Case] = []

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(case=conversations(family))
    def collect(case: Case) -> None:
        if checks.is_expressible(family, case):
            cases.append(case)

    collect()
    return cases


def row(family: Family, num_generated: int) -> list[str]:
    """Return the family's row of the table."""
    cases = fixed_cases(family) + generated_cases(family, num_generated)
    exact_prompt, exact_full, split = Count(), Count(), 0
    for case in cases:
        full_held = _is_exact(family, case, prompt=False)
        exact_full.add(full_held)
        split += not full_held and checks.parity_problem(family, case, prompt=False) is None
        question = _before_the_reply(case)
        if question is not None:
            exact_prompt.add(_is_exact(family, question, prompt=True))
    return [
        family.name,
        str(exact_prompt),
        str(exact_full),
        str(split),
        str(_held(family, cases, checks.consistency_problem)),
        str(_held(family, cases, checks.round_trip_problem)),
        str(_injection(family)),
        str(_streaming(family, cases)),
        _extension(family, cases),
    ]


def _is_exact(family: Family, case: Case, *, prompt: bool) -> bool:
    messages, renderer = checks.with_tools(family, case), family.renderer
    ours = renderer.render_prompt(messages) if prompt else renderer.render(messages)
    return ours.tokens() == family.reference(case.messages, prompt=prompt, tools=case.tools)


def _before_the_reply(case: Case) -> Case | None:
    """Return the conversation as it stands when a reply is wanted; None if nobody spoke yet."""
    messages = case.messages
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    is_prompt = bool(messages) and messages[-1]["role"] in ("user", "tool")
    return Case(case.category, messages, case.tools) if is_prompt else None


def _held(family: Family, cases: list[Case], check: Callable[[Family, Case], str | None]) -> Count:
    count = Count()
    for case in cases:
        count.add(check(family, case) is None)
    return count


def _injection(family: Family) -> Count:
    """Up to 60 control tokens in every role, alone and inside text."""
    count, renderer = Count(), family.renderer
    markers = markers_of(family)
    markers = markers[:: -(-len(markers) // _MAX_MARKERS)]
    texts = [t for m in markers for t in (m, f"a{m}b", m[:-1], m[1:], f"\n{m}")]
    harmless = [0 for _ in range(3)]
    for role_index, role in enumerate(("system", "user", "assistant")):
        talks: list[list[Message]] = [[{"role": role, "content": t}] for t in ("x", *texts)]
        renderings = renderer.render_batch(talks)
        controls = [
            [t for t in rendering.tokens() if renderer.encoder.is_control(t)]
            for rendering in renderings
        ]
        harmless[role_index] = len(controls[0])
        for found in controls[1:]:
            count.add(found == controls[0])
    assert all(harmless)
    return count


def _streaming(family: Family, cases: list[Case]) -> Count:
    """Every conversation's tokens as if they were a reply, cut and fed at random places."""
    count, choose = Count(), random.Random(0)
    for case in cases:
        tokens = family.renderer.render(checks.with_tools(family, case)).tokens()
        reply = tokens[choose.randrange(len(tokens)) :][: choose.randrange(1, 200)]
        parser = family.renderer.response_parser()
        position = 0
        while position < len(reply):
            step = choose.randrange(1, 6)
            for _ in parser.feed(reply[position : position + step]):
                pass
            position += step
        for _ in parser.finish():
            pass
        count.add(parser.result() == family.renderer.parse_response(reply))
    return count


def _extension(family: Family, cases: list[Case]) -> str:
    several = [c for c in cases if sum(m["role"] == "assistant" for m in c.messages) > 1]
    count = _held(family, several, checks.extension_problem)
    claimed = "yes" if family.renderer.has_extension_property else "no"
    return f"{claimed} ({count})"


def table(num_generated: int) -> str:
    """Return the table as Markdown; its rows are printed as they come."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    print("\n".join(lines))
    for family in FAMILIES.values():
        lines.append("| " + " | ".join(row(family, num_generated)) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def format_table() -> str:
    """Return the table of formats as Markdown; its rows are in the modules of the formats."""
    lines = ["| name | for | notes |", "|---|---|---|"]
    for renderer in BUILT_IN.values():
        models = renderer.models.replace("|", "\\|")
        lines.append(f"| `{renderer.name}` | {models} | {renderer.notes} |")
    return "\n".join(lines)


def write(markdown: str) -> None:
    """Replace the table in the docs that has the same header."""
    header = markdown.partition("\n")[0]
    [path] = [path for path in PAGES if header in path.read_text("utf-8")]
    page = path.read_text("utf-8")
    start = page.index(header)
    end = page.index("\n\n", start)
    path.write_text(page[:start] + markdown + page[end:], "utf-8")


def main(arguments: list[str]) -> None:
    """Print a table, or write it into the docs."""
    if "--formats" in arguments:
        write(format_table())
        return
    numbers = [int(word) for word in arguments if word.isdecimal()]
    markdown = table(*(numbers or [200]))
    if "--markdown" in arguments:
        write(markdown)


if __name__ == "__main__":
    main(sys.argv[1:])
