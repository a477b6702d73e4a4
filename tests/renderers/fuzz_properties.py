"""Properties of all renderers on many random inputs.

    python -m tests.renderers.fuzz_properties [REPLIES] [FAMILY ...]    # 2,000; all families

For each family: replies of random tokens, pieces of real replies, doubled and missing stop tokens
(each taken whole, in random bites and token by token); real replies cut at every token; and every
special token of every tokenizer, whole and in pieces, in each place where the format takes text.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from functools import cache

import numpy as np

from tinker_cookbook.exceptions import RendererError
from tinker_cookbook.renderers.battery import properties

from . import checks
from .conversations import fixed_cases
from .families import FAMILIES
from .family import Family

_NUM_ALIKE = 4


@cache
def proper_replies(family_name: str) -> list[list[int]]:
    """Return the trained tokens of the last reply of each fixed conversation that has one."""
    family = FAMILIES[family_name]
    replies: list[list[int]] = []
    for case in fixed_cases(family):
        messages = checks.with_tools(family, case)
        if messages[-1]["role"] != "assistant":
            continue
        try:
            model_input, weights = family.renderer.build_supervised_example(messages)
        except RendererError:
            continue
        tokens = [t for chunk in model_input.chunks for t in getattr(chunk, "tokens", ())]
        if len(tokens) == len(weights):
            replies.append(np.asarray(tokens)[weights > 0].tolist())
    return replies


@cache
def all_markers() -> tuple[str, ...]:
    """Return every special token of every tokenizer; of those that differ in a number, a few."""
    tokenizers = {f.tokenizer_name: f.renderer for f in FAMILIES.values()}
    names = {name for r in tokenizers.values() for name in properties.control_names(r)}
    kept: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.strip()):
        kept.setdefault(re.sub(r"\d+", "0", name), []).append(name)
    few = (name for alike in kept.values() for name in alike[:_NUM_ALIKE])
    return tuple(sorted({*properties.FOREIGN_MARKERS, *few}))


def reply_problems(family: Family, count: int, seed: int = 0) -> Iterator[str]:
    """Yield what is wrong with the parses of `count` random replies."""
    choose = random.Random(f"{family.name} {seed}")
    replies = proper_replies(family.name)
    for _ in range(count):
        tokens = properties.random_reply(family.renderer, choose, replies)
        problem = properties.parse_problem(family.renderer, tokens, choose)
        if problem:
            yield f"{tokens}: {problem}"


def injections(family: Family, markers: list[str]) -> Iterator[tuple[str, int, str | None]]:
    """Yield for each place its name, how many texts were typed there, and what is wrong."""
    texts = list(properties.marker_texts(markers))
    for place, talk in properties.typed_conversations(family.renderer).items():
        try:
            count, problem = properties.injection_problem(family.renderer, talk, texts)
        except RendererError:
            continue  # the format does not have this place for text
        yield place, count, problem


def fuzz(family: Family, num_replies: int) -> None:
    """Check one family and print the counts."""
    problems = list(reply_problems(family, num_replies))
    num_cut = 0
    for reply in proper_replies(family.name):
        found = properties.truncation_problem(family.renderer, reply)
        found = found or properties.stop_problem(family.renderer, reply)
        problems += [found] if found else []
        num_cut += len(reply) + 4
    typed, places = 0, []
    for place, count, problem in injections(family, list(all_markers())):
        typed += count
        places.append(place)
        problems += [f"{place}: {problem}"] if problem else []
    print(
        f"{family.name}: {num_replies:,} random replies, {num_cut:,} cut or doubled, "
        f"{typed:,} typed markers in {len(places)} places: {len(problems)} problems",
        flush=True,
    )
    for problem in problems[:3]:
        print(f"    {problem[:400]}", flush=True)


def main(arguments: list[str]) -> None:
    """Check the families asked for."""
    num_replies = int(arguments[0]) if arguments else 2000
    for name in arguments[1:] or FAMILIES:
        fuzz(FAMILIES[name], num_replies)


if __name__ == "__main__":
    main(sys.argv[1:])
