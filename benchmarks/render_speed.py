"""Measure the CPU time of rendering conversations with weights, compared with other packages.

    python -m benchmarks.render_speed [CONVERSATIONS] [ROUNDS] [FOLDER]    # 400 conversations, 3
    python -m benchmarks.render_speed processes                            # one process against two

Every round runs all contestants on one core, in random order, so that changes of the machine's
speed affect all of them; the median of the rounds is printed. All render the same conversations
with the Qwen3 vocabulary. Packages that are not dependencies of this project run if they are
installed: `pip install tml-renderers renderers`. FOLDER contains the upstream cookbook, whose
package has the same name as this one, so it renders in a separate process, in the same rounds: `pip
install --no-deps --target FOLDER tinker-cookbook`.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import concurrent.futures
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import tinker

from tests.assets import load_tokenizer, tokenizer_folder
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from tinker_cookbook.renderers.encoding import fast as fast_encoding

_WORDS = (
    "the of and to in is that it for you with on as are this be at or have from one by word but "
    "what some we can out other were all there when up use your how said each she which their time "
    "will way about many then them write would like so these her long make thing see him two has "
    "look more day could go come did number sound no most people my over know water than call "
    "who may down side been now find Any new work part take get place made live where after back "
    "little only round man year came show every good me give our under tokenizer gradient loss "
    "München naïve 3.14 2024 function() print(x) `code` don't it's"
).split()
_ALL = TrainOnWhat.ALL_ASSISTANT_MESSAGES
Contestant = Callable[[], int]
"""Renders everything once and returns the number of tokens."""


def make_conversations(count: int) -> list[list[dict[str, str]]]:
    """Return conversations of six messages and about 650 tokens, equal in every run."""
    choose = random.Random(0)

    def text() -> str:
        words = [choose.choice(_WORDS) for _ in range(choose.randint(20, 180))]
        return " ".join(words).capitalize() + "."

    roles = ("user", "assistant") * 3
    return [[{"role": role, "content": text()} for role in roles] for _ in range(count)]


def _ours(tokenizer: Any, talks: Any) -> dict[str, Contestant]:
    renderer = get_renderer("qwen3_instruct", tokenizer)
    slow = get_renderer("qwen3_instruct", tokenizer)
    setattr(slow.encoder, "_characters_left", sys.maxsize)  # noqa: B010 -- never switches
    switched = renderer.encoder.switch()  # pyright: ignore[reportAttributeAccessIssue]
    ways: dict[str, Contestant] = {}
    for name, used in [("ours", renderer)] * switched + [("ours, without tiktoken", slow)]:

        def single(used: Any = used) -> int:
            return sum(used.build_supervised_example(talk, _ALL)[0].length for talk in talks)

        def batch(used: Any = used) -> int:
            pairs = used.build_supervised_batch(talks, _ALL)
            return sum(model_input.length for pair in pairs for model_input, _ in pair)

        ways[f"{name}: build_supervised_example"] = single
        ways[f"{name}: build_supervised_batch"] = batch
    return ways


def _tokens_alone(tokenizer: Any, talks: Any) -> dict[str, Contestant]:
    renderer = get_renderer("qwen3_instruct", tokenizer)
    renderer.encoder.switch()  # pyright: ignore[reportAttributeAccessIssue]
    fast = renderer.encoder._fast  # pyright: ignore[reportAttributeAccessIssue]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    backend = tokenizer.backend_tokenizer

    def encode_batch() -> int:
        return sum(len(e.ids) for e in backend.encode_batch(texts, add_special_tokens=False))

    def encode_batch_fast() -> int:
        batch = backend.encode_batch_fast(texts, add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in batch)

    def template() -> int:
        return sum(
            len(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False))
            for talk in talks
        )

    ways: dict[str, Contestant] = {
        "tokenizers encode_batch of the finished text": encode_batch,
        "tokenizers encode_batch_fast of the finished text": encode_batch_fast,
        "transformers apply_chat_template (no weights)": template,
    }
    if fast is not None:
        encode = _plain_tiktoken(renderer.encoder)
        ways["tiktoken of the finished text, with the model's own rule of splitting"] = lambda: sum(
            len(encode(text)) for text in texts
        )
        ways["tiktoken of the finished text, with the rule rewritten"] = lambda: sum(
            len(fast.encode(text)) for text in texts
        )
    return ways


def _plain_tiktoken(encoder: Any) -> Callable[[str], list[int]]:
    """Return tiktoken's encoding with the tokenizer's pattern, without checks."""
    import tiktoken

    config = json.loads(encoder._plain.to_str())
    rule = fast_encoding._split_pattern(config["pre_tokenizer"])
    ranks = fast_encoding._proved_ranks(config["model"], encoder._byte_of)
    assert rule is not None
    assert ranks is not None
    return tiktoken.Encoding(
        "plain", pat_str=rule, mergeable_ranks=ranks, special_tokens={}
    ).encode_ordinary


def _prime(tokenizer: Any, talks: Any) -> dict[str, Contestant]:
    """Return Prime Intellect's `renderers`, which gives token ids and their origin."""
    try:
        from renderers import Qwen3Renderer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    renderer = Qwen3Renderer(tokenizer)
    return {
        "renderers (Prime): render": lambda: sum(
            len(renderer.render(talk).token_ids) for talk in talks
        )
    }


def _tml(talks: Any) -> dict[str, Contestant]:
    """Return the compiled `tml-renderers`, which gives the same input and weights."""
    try:
        from tml_renderers import chat, renderers  # pyright: ignore[reportMissingImports]
        from tml_renderers.tinker import (  # pyright: ignore[reportMissingImports]
            training_example_to_tinker_model_input_and_weights as to_tinker,
        )
    except ImportError:
        return {}
    renderer = renderers.Qwen3.instruct()

    def examples() -> int:
        total = 0
        for talk in talks:
            for example in renderer.render_for_sft(chat.MessageList.from_oss_messages(talk)):
                total += to_tinker(example)[0].length
        return total

    def render() -> int:
        total = 0
        for talk in talks:
            spans = renderer.render_for_completion(chat.MessageList.from_oss_messages(talk))[0]
            total += sum(len(span.span.tokens) for span in spans)
        return total

    return {
        "tml-renderers (compiled): input and weights": examples,
        "tml-renderers (compiled): token ids of a prompt": render,
    }


_UPSTREAM = """
import json, sys, time
import tinker, torch
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from transformers import AutoTokenizer
torch.set_num_threads(1)
talks = json.load(open(sys.argv[1]))
renderer = get_renderer("qwen3_instruct", AutoTokenizer.from_pretrained(sys.argv[2]))
for line in sys.stdin:
    started = time.process_time()
    total = 0
    for talk in talks:
        example = renderer.build_supervised_example(talk, TrainOnWhat.ALL_ASSISTANT_MESSAGES)
        total += example[0].length
    print(total, time.process_time() - started, flush=True)
"""


class _Upstream:
    """The upstream cookbook in a separate process, which runs one pass per line of input."""

    def __init__(self, folder: str, talks: Any) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(talks, file)
        self._talks = file.name
        command = [sys.executable, "-c", _UPSTREAM, self._talks]
        self._process = subprocess.Popen(
            [*command, str(tokenizer_folder("qwen3_instruct_2507"))],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.path.abspath(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> tuple[int, float]:
        """Return the tokens of one pass and its CPU seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        tokens, seconds = self._process.stdout.readline().split()
        return int(tokens), float(seconds)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        os.unlink(self._talks)


Timed = Callable[[], tuple[int, float]]


def timed(way: Contestant) -> Timed:
    """Return a contestant that also measures its CPU seconds."""

    def run() -> tuple[int, float]:
        started = time.process_time()
        tokens = way()
        return tokens, time.process_time() - started

    return run


def measure(ways: dict[str, Timed], rounds: int) -> dict[str, tuple[int, list[float]]]:
    """Return the tokens of one pass and the CPU seconds of each round, per contestant."""
    results: dict[str, tuple[int, list[float]]] = {
        name: (way()[0], []) for name, way in ways.items()
    }
    order = list(ways)
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name in order:
            results[name][1].append(ways[name]()[1])
    return results


def main(num_conversations: int = 400, rounds: int = 3, upstream_folder: str = "") -> None:
    """Print the table as Markdown."""
    tokenizer = load_tokenizer("qwen3_instruct_2507")
    talks = make_conversations(num_conversations)
    tinker.ModelInput.from_ints([1])  # the import is not part of the measurement
    here = {**_ours(tokenizer, talks), **_tokens_alone(tokenizer, talks)}
    here |= {**_prime(tokenizer, talks), **_tml(talks)}
    ways = {name: timed(way) for name, way in here.items()}
    upstream = _Upstream(upstream_folder, talks) if upstream_folder else None
    if upstream is not None:
        ways["tinker-cookbook (upstream): build_supervised_example"] = upstream.run
    results = measure(ways, rounds)
    if upstream is not None:
        upstream.close()
    base_name = "tokenizers encode_batch of the finished text"
    base = results[base_name][0] / statistics.median(results[base_name][1])
    print(
        "| what | conversations/s | tokens/s (CPU, one core) | x encode_batch |\n|---|---|---|---|"
    )
    for name, (tokens, seconds) in results.items():
        median = statistics.median(seconds)
        rate = tokens / median
        print(f"| {name} | {num_conversations / median:,.0f} | {rate:,.0f} | {rate / base:.2f} |")


_PROCESS_SECONDS = 5.0


def _rate(barrier: Any) -> float:
    """Return conversations per second of wall time in this process, once all are ready."""
    renderer = get_renderer("qwen3_instruct", load_tokenizer("qwen3_instruct_2507"))
    renderer.encoder.switch()  # pyright: ignore[reportAttributeAccessIssue]
    talks: Any = make_conversations(100)
    renderer.build_supervised_batch(talks, _ALL)
    barrier.wait()
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < _PROCESS_SECONDS:
        renderer.build_supervised_batch(talks, _ALL)
        done += len(talks)
    return done / (time.perf_counter() - started)


def processes() -> None:
    """Print the speed of two concurrent processes compared with one."""
    context = multiprocessing.get_context("spawn")
    rates = {}
    with context.Manager() as manager:
        for count in (1, 2):
            barrier = manager.Barrier(count)
            with concurrent.futures.ProcessPoolExecutor(count, mp_context=context) as pool:
                rates[count] = sum(pool.map(_rate, [barrier] * count))
    efficiency = rates[2] / (2 * rates[1])
    print(f"one process {rates[1]:,.0f} conversations/s, two {rates[2]:,.0f}: {efficiency:.0%}")


if __name__ == "__main__":
    if sys.argv[1:] == ["processes"]:
        processes()
    else:
        numbers = [int(word) for word in sys.argv[1:3]]
        main(*numbers, upstream_folder="".join(sys.argv[3:4]))
