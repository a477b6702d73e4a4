"""Write an instruction for each passage; the passage is the answer to it.

There are three ways: from templates (without a model), with the base model that will be trained, or
with any service that has OpenAI's chat protocol.
"""

import json
import math
import os
import re
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tinker_cookbook.exceptions import ConfigurationError

from .passages import Passage

__all__ = [
    "ask_openai",
    "describe_by_endpoint",
    "describe_by_template",
    "find_characteristic_words",
    "request_description",
]

NUM_KEYWORDS = 4
MAX_DESCRIPTION_CHARS = 300
REQUEST_SECONDS = 120.0
_WORD = re.compile(r"[^\W\d_]{4,}")

AskModel = Callable[[str], str]


def describe_by_template(passages: Sequence[Passage], *, style: str) -> list[str]:
    """Write instructions that name the length and the characteristic words of each passage."""
    subjects = find_characteristic_words([passage.text for passage in passages])
    return [
        _instruction(passage, style, f"Use the words {_listed(words)}." if words else "")
        for passage, words in zip(passages, subjects, strict=True)
    ]


def describe_by_endpoint(
    passages: Sequence[Passage], *, style: str, ask: AskModel, num_parallel: int
) -> list[str]:
    """Write instructions with a one-sentence summary of each passage, which `ask` writes."""
    requests = [request_description(passage) for passage in passages]
    with ThreadPoolExecutor(num_parallel) as pool:
        summaries = list(pool.map(ask, requests))
    return [
        _instruction(passage, style, _first_sentence(summary))
        for passage, summary in zip(passages, summaries, strict=True)
    ]


def request_description(passage: Passage) -> str:
    """Return the question about a passage."""
    return f"{passage.text}\n\nIn one plain sentence of at most 25 words, what happens here?"


def find_characteristic_words(texts: Sequence[str]) -> list[list[str]]:
    """Return the words that each text uses often and the others rarely (tf-idf), best first."""
    counts = [Counter(word.lower() for word in _WORD.findall(text)) for text in texts]
    document_counts = Counter(word for count in counts for word in count)
    found = []
    for count in counts:
        score = {
            word: times * math.log(len(texts) / document_counts[word])
            for word, times in count.items()
        }
        ranked = sorted(score, key=lambda word: (-score[word], word))
        found.append([best for best in ranked if score[best] > 0][:NUM_KEYWORDS])
    return found


def ask_openai(*, base_url: str, model: str) -> AskModel:
    """Return a function that sends one user message to an OpenAI-compatible endpoint.

    The key is read from `OPENAI_API_KEY`; most local servers do not need one.

    Raises:
        ConfigurationError: from the returned function, with the answer of the endpoint.
    """
    url = f"{base_url.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"

    def ask(prompt: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                answer = json.load(response)
            return answer["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise ConfigurationError(
                f"instructions_url={base_url} refused ({error.code}): {said}"
            ) from error
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigurationError(
                f"instructions_url={base_url} gave no chat answer ({error!r}); it must be the "
                "address before /chat/completions, such as http://localhost:8000/v1."
            ) from error

    return ask


def _instruction(passage: Passage, style: str, subject: str) -> str:
    num_words = max(10, round(len(passage.text.split()), -1))
    source = f" from {passage.section_title}" if passage.section_title else ""
    request = f"Write about {num_words} words{source} in the style of {style}."
    return f"{request} {subject}".strip()


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


def _first_sentence(text: str) -> str:
    """Return the first sentence on one line; the rest of a long summary is dropped."""
    line = " ".join(text.split())[:MAX_DESCRIPTION_CHARS]
    return re.split(r"(?<=[.!?])\s", line, maxsplit=1)[0]
