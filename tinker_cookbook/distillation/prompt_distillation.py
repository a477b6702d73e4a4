"""Prompt distillation: what a long prompt makes a model do, learned so that the prompt can go.

The teacher sees messages that the student does not see: instructions, or solved examples. It writes
a reply to each question. The student is trained on these replies behind the question alone, with
the teacher's probabilities as targets. The replies are kept in the run directory, so that a resumed
run trains on the same ones.

Sources: arXiv:2112.00861 (context distillation), arXiv:2209.15189.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import chz
import numpy as np

from tinker_cookbook.completers import derive_seed
from tinker_cookbook.distillation.teacher import TeacherConfig, missing_teacher
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError
from tinker_cookbook.renderers.types import Message
from tinker_cookbook.supervised.common import datum_from_model_input_weights
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder
from tinker_cookbook.utils.sdk_compat import wait_for_client

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.renderers import Renderer

__all__ = ["REPLIES_FILE", "PromptDistillationBuilder", "PromptDistillationDataset"]

logger = logging.getLogger(__name__)

REPLIES_FILE = "teacher_replies.jsonl"
"""File in the run directory: one object per reply, with question, tokens, reply and ended."""
REPLY_KEYS = ("question", "tokens", "ended")


class PromptDistillationDataset(SupervisedDataset):
    """Replies of a teacher, behind the student's prompt; the teacher has its own."""

    def __init__(
        self,
        rows: Sequence[dict],
        renderer: Renderer,
        *,
        teacher_messages: Sequence[Message],
        student_messages: Sequence[Message],
        batch_size: int,
    ) -> None:
        """Keep the replies.

        Args:
            rows: Objects with `question` and `tokens`.
            renderer: Writes the prompts.
            teacher_messages: Messages before each question in the teacher's prompt.
            student_messages: Messages before each question in the student's prompt.
            batch_size: Replies per batch; a last batch that is not full is left out.
        """
        self._rows = list(rows)
        self._order = list(range(len(self._rows)))
        self._renderer = renderer
        self._teacher_messages = list(teacher_messages)
        self._student_messages = list(student_messages)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size

    def set_epoch(self, seed: int = 0) -> None:
        """Shuffle for a new epoch."""
        self._order = list(range(len(self._rows)))
        random.Random(seed).shuffle(self._order)

    def get_batch(self, index: int) -> list[tinker.Datum]:
        """Return the student's view: its prompt and the reply, of which the reply is trained."""
        return [self._datum(row) for row in self._batch(index)]

    def get_teacher_prompts(self, index: int) -> list[tinker.ModelInput]:
        """Return the teacher's prompt of each reply."""
        return [
            build_prompt(self._renderer, self._teacher_messages, row["question"])
            for row in self._batch(index)
        ]

    def _batch(self, index: int) -> list[dict]:
        start = index * self._batch_size
        return [self._rows[i] for i in self._order[start : start + self._batch_size]]

    def _datum(self, row: dict) -> tinker.Datum:
        import tinker

        prompt = build_prompt(self._renderer, self._student_messages, row["question"])
        reply = tinker.EncodedTextChunk(tokens=row["tokens"])
        weights = np.zeros(prompt.length + len(row["tokens"]), np.float32)
        weights[prompt.length :] = 1.0
        chunks = [*prompt.chunks, reply]
        return datum_from_model_input_weights(tinker.ModelInput(chunks=chunks), weights)


@chz.chz
class PromptDistillationBuilder(SupervisedDatasetBuilder):
    """Questions, and the messages that come before them in the teacher's prompt."""

    questions: list[str] = chz.field(doc="Questions to train on.")
    test_questions: list[str] = chz.field(default_factory=list, doc="Held-out questions.")
    teacher_messages: list[Message] = chz.field(doc="Messages that only the teacher sees.")
    student_messages: list[Message] = chz.field(
        default_factory=list, doc="Messages before each question in the student's prompt."
    )
    teacher_config: TeacherConfig = chz.field(doc="The model that writes the replies.")
    model_name_for_tokenizer: str = chz.field(doc="Model whose tokenizer is used.")
    renderer_name: str = chz.field(doc="Chat format.")
    log_path: str = chz.field(doc="Run directory, where the replies are kept.")
    replies_path: str | None = chz.field(
        default=None, doc="File of the replies; None: teacher_replies.jsonl in the run directory."
    )
    batch_size: int = chz.field(doc="Replies per optimizer step.")
    samples_per_question: int = chz.field(default=1, doc="Replies sampled per question.")
    max_tokens: int = chz.field(default=64, doc="Maximum number of tokens per reply.")
    temperature: float = chz.field(default=1.0, doc="Sampling temperature of the replies.")
    seed: int = chz.field(default=0, doc="Random seed of the replies.")

    def __call__(self) -> tuple[SupervisedDataset, SupervisedDataset | None]:
        """Let the teacher write the replies, or read those of an interrupted run.

        Raises:
            ConfigurationError: if the questions are too few for one batch.
        """
        from tinker_cookbook.renderers import load_renderer

        renderer = load_renderer(self.renderer_name, self.model_name_for_tokenizer)
        path = Path(self.replies_path or Path(self.log_path) / REPLIES_FILE).expanduser()
        if path.is_dir():
            raise ConfigurationError(f"replies={path} is a folder; name a file.")
        if not path.exists():
            self._check_questions()
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._sample(renderer)
            scratch = path.with_suffix(".part")
            scratch.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            scratch.rename(path)
        rows = _read_replies(path)
        held_out = set(self.test_questions)
        train = [row for row in rows if row["question"] not in held_out]
        test = [row for row in rows if row["question"] in held_out]
        if len(train) < self.batch_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than the {len(train)} replies in {path}; "
                "use a smaller number, or more questions."
            )
        cut = sum(not row["ended"] for row in rows)
        print(f"data     {len(rows)} replies of the teacher, {cut} cut by max_tokens", flush=True)
        return (
            self._dataset(train, renderer, self.batch_size),
            self._dataset(test, renderer, len(test)) if test else None,
        )

    def _check_questions(self) -> None:
        """Refuse questions that cannot give a batch, before the teacher is asked."""
        for number, question in enumerate(self.questions):
            if not question.strip():
                raise DataValidationError(f"questions[{number}] is empty; leave it out.")
        expected = len(self.questions) * self.samples_per_question
        if expected < self.batch_size:
            raise ConfigurationError(
                f"batch_size={self.batch_size} is more than the {expected} replies to "
                f"{len(self.questions)} questions; use a smaller number, or more questions."
            )

    def _dataset(
        self, rows: Sequence[dict], renderer: Renderer, batch_size: int
    ) -> PromptDistillationDataset:
        return PromptDistillationDataset(
            rows,
            renderer,
            teacher_messages=self.teacher_messages,
            student_messages=self.student_messages,
            batch_size=batch_size,
        )

    def _sample(self, renderer: Renderer) -> list[dict]:
        """Sample the replies, all requests at once."""
        import tinker

        from tinker_cookbook import service

        questions = [*self.questions, *self.test_questions]
        client = service.current_connection().service_client()
        path = self.teacher_config.load_checkpoint_path
        try:
            teacher = wait_for_client(
                client.create_sampling_client(base_model=self.teacher_config.base_model)
                if path is None
                else client.create_sampling_client(model_path=path)
            )
        except (tinker.TinkerError, ValueError) as error:
            raise missing_teacher(self.teacher_config, error) from error
        print(f"teacher  writes {len(questions)} x {self.samples_per_question} replies", flush=True)
        waiting = [
            teacher.sample(
                build_prompt(renderer, self.teacher_messages, question),
                self.samples_per_question,
                tinker.SamplingParams(
                    max_tokens=self.max_tokens,
                    temperature=self.temperature,
                    stop=renderer.get_stop_sequences(),
                    seed=derive_seed(self.seed, "reply", number),
                ),
            )
            for number, question in enumerate(questions)
        ]
        rows = []
        for question, future in zip(questions, waiting, strict=True):
            for sequence in future.result().sequences:
                tokens = list(sequence.tokens)
                text = str(renderer.tokenizer.decode(tokens))
                ended = sequence.stop_reason == "stop"
                rows.append({"question": question, "tokens": tokens, "reply": text, "ended": ended})
        return rows


def _read_replies(path: Path) -> list[dict]:
    """Return the replies in a file.

    Raises:
        DataValidationError: naming the file and the line that is not a reply.
    """
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or any(key not in row for key in REPLY_KEYS):
                raise DataValidationError(
                    f"{path}, line {number}: expected a JSON object with {', '.join(REPLY_KEYS)}; "
                    f"got {line[:60].rstrip()!r}. Write the file with this recipe's create_data, "
                    "or name another one."
                )
            rows.append(row)
    return rows


def build_prompt(
    renderer: Renderer, messages: Sequence[Message], question: str
) -> tinker.ModelInput:
    """Return the prompt of a question behind messages.

    Raises:
        DataValidationError: if the question is empty.
    """
    if not question:
        raise DataValidationError("a question is empty; leave it out.")
    asked: Message = {"role": "user", "content": question}
    return renderer.build_generation_prompt([*messages, asked])
