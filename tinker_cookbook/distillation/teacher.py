"""The teacher: a frozen model that scores the student's tokens, or names its own.

A teacher sees the same tokens as the student, or has another prompt before the same completion:
longer instructions, solved examples, a demonstration. `place` finds the trained positions in what
the teacher sees. Token ids are copied between the models, so both need the same tokenizer;
`check_same_tokenizer` compares them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import chz
import numpy as np

from tinker_cookbook import checkpoint_utils
from tinker_cookbook.completers import derive_seed
from tinker_cookbook.distillation.compatibility import (
    check_same_format,
    check_same_tokenizer,
    find_unsuitable_format,
)
from tinker_cookbook.distillation.target_cache import TargetCache, Targets
from tinker_cookbook.exceptions import ConfigurationError, DataValidationError, TrainingError
from tinker_cookbook.utils.sdk_compat import (
    call,
    can_score_last_tokens,
    create_client,
    rest_client_of,
    service_message,
)

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.runs.open_run import Run

__all__ = [
    "PlacedSequence",
    "Teacher",
    "TeacherConfig",
    "check_same_tokenizer",
    "open_teacher",
    "open_teachers",
    "place",
    "trained_positions",
]

TargetKind = Literal["top", "drawn"]
"""The K most likely tokens of each position, or K tokens drawn independently."""


@chz.chz
class TeacherConfig:
    """A teacher: a base model, or saved weights."""

    base_model: str = chz.field(doc="Base model of the teacher.")
    load_checkpoint_path: str | None = chz.field(
        default=None, doc="Sampler weights (tinker://...); None: the base model itself."
    )
    renderer_name: str | None = chz.field(
        default=None,
        doc="Chat format of the teacher; None: the one recorded with its weights. Set it to the "
        "student's to ask a teacher in a format that it was not trained with.",
    )

    @property
    def identity(self) -> str:
        """A name that differs between teachers."""
        return self.load_checkpoint_path or self.base_model


@dataclass(frozen=True)
class PlacedSequence:
    """What the teacher sees, and where the trained positions of a datum are in it."""

    sequence: tinker.ModelInput
    tokens_n: np.ndarray
    """Indices in `sequence` of the tokens that the trained positions predict, increasing."""

    @property
    def num_scored(self) -> int:
        """Length of the end of the sequence that contains all trained tokens."""
        return self.sequence.length - int(self.tokens_n[0])


def place(
    datum: tinker.Datum,
    positions_n: np.ndarray,
    teacher_prompt: tinker.ModelInput | None = None,
) -> PlacedSequence:
    """Find the trained positions of a datum in what the teacher sees.

    Args:
        datum: Position i of its input predicts token i + 1, and the last position the last target.
        positions_n: The trained positions, at least one, increasing.
        teacher_prompt: Comes before the completion instead of the student's prompt. The
            completion begins with the first trained token. None: the teacher sees the same tokens.
    """
    import tinker

    last = int(datum.loss_fn_inputs["target_tokens"].to_numpy()[-1])
    if teacher_prompt is None:
        chunks = [*datum.model_input.chunks, tinker.EncodedTextChunk(tokens=[last])]
        return PlacedSequence(tinker.ModelInput(chunks=chunks), positions_n + 1)
    first = int(positions_n[0])
    completion = [*datum.model_input.to_ints()[first + 1 :], last]
    chunks = [*teacher_prompt.chunks, tinker.EncodedTextChunk(tokens=completion)]
    return PlacedSequence(
        tinker.ModelInput(chunks=chunks), positions_n - first + teacher_prompt.length
    )


class Teacher:
    """A frozen model on the service."""

    def __init__(
        self,
        client: tinker.SamplingClient,
        identity: str,
        *,
        cache: TargetCache | None = None,
        concurrency: int = 64,
        context_window: int | None = None,
    ) -> None:
        """Keep the client.

        Args:
            client: Samples from the teacher.
            identity: A name that differs between teachers.
            cache: Targets that were computed before.
            concurrency: Maximum number of requests at a time.
            context_window: Maximum tokens of a sequence; None: unknown.
        """
        self.num_scored = 0
        """Sequences that the service has scored for this object."""
        self.client = client
        self.identity = identity
        """A name that differs between teachers."""
        self.context_window = context_window
        """Maximum tokens of a sequence; None: unknown."""
        self._cache = cache
        self._slots = asyncio.Semaphore(concurrency)

    async def check(self, count: int, kind: TargetKind = "top", name: str = "topk") -> None:
        """Ask for `count` targets of one token, so that a teacher without them is refused early.

        Args:
            count: Tokens per position.
            kind: Which tokens these are.
            name: Setting that gives `count`, for the message.

        Raises:
            ConfigurationError: if the service does not return them.
        """
        import tinker

        if not count:
            return
        probe = PlacedSequence(tinker.ModelInput.from_ints([1, 2]), np.array([1]))
        ask = self._top_tokens if kind == "top" else self._drawn_tokens
        try:
            await ask(probe, count, b"")
        except TrainingError as error:
            raise ConfigurationError(
                f"{name}={count} is not possible with the teacher {self.identity}: {error} Use a "
                "smaller number, or another service; on-policy distillation also works with "
                "topk=0, without such tokens."
            ) from error
        self.num_scored -= 1

    async def score(self, placed: PlacedSequence) -> np.ndarray:
        """Return the log probabilities of the trained tokens, float64 [n]."""
        response = await self._ask(placed, **_only_last(placed))
        return _prompt_logprobs(response)[placed.tokens_n]

    async def score_with_top(
        self, placed: PlacedSequence, count: int
    ) -> tuple[np.ndarray, Targets | None]:
        """Return the log probabilities of the trained tokens, and the top tokens if count > 0."""
        if not count:
            return await self.score(placed), None
        response = await self._ask(placed, topk_prompt_logprobs=count, **_only_last(placed))
        tokens, logprobs = _top_arrays(response, count)
        rows = placed.tokens_n
        return _prompt_logprobs(response)[rows], Targets(tokens[rows], logprobs[rows])

    async def targets(self, placed: PlacedSequence, count: int, kind: TargetKind) -> Targets:
        """Return `count` tokens for each trained position, from the cache if they are there."""
        key = self._key(placed, count, kind)
        found = None if self._cache is None else await asyncio.to_thread(self._cache.get, key)
        if found is None:
            ask = self._top_tokens if kind == "top" else self._drawn_tokens
            found = await ask(placed, count, key)
            if self._cache is not None:
                await asyncio.to_thread(self._cache.put, key, found)
        return found

    def fits(self, placed: PlacedSequence) -> bool:
        """Return whether the teacher can read the sequence; one more token has to fit."""
        return self.context_window is None or placed.sequence.length < self.context_window

    async def _top_tokens(self, placed: PlacedSequence, count: int, key: bytes) -> Targets:
        del key
        response = await self._ask(placed, topk_prompt_logprobs=count, **_only_last(placed))
        tokens, logprobs = _top_arrays(response, count)
        return Targets(tokens[placed.tokens_n], logprobs[placed.tokens_n])

    async def _drawn_tokens(self, placed: PlacedSequence, count: int, key: bytes) -> Targets:
        # The seed is part of the request, so the draws do not depend on the order of requests.
        seed = derive_seed(0, "targets", key.hex())
        response = await self._ask(placed, seed=seed, prompt_alt_tokens_k=count)
        drawn = response.prompt_alt_tokens
        if drawn is None:
            raise TrainingError(
                "the service did not return prompt_alt_tokens; use another objective than sampled."
            )
        rows = placed.tokens_n - 1  # row i covers token i + 1
        return Targets(
            drawn.tokens.to_numpy().reshape(-1, count)[rows].astype(np.int32),
            drawn.logprobs.to_numpy().reshape(-1, count)[rows].astype(np.float32),
        )

    async def _ask(
        self, placed: PlacedSequence, *, seed: int | None = None, **scores: Any
    ) -> tinker.SampleResponse:
        import tinker

        params = tinker.SamplingParams(max_tokens=1, temperature=1.0, seed=seed)
        async with self._slots:
            try:
                response = await call(
                    self.client,
                    "sample",
                    prompt=placed.sequence,
                    num_samples=1,
                    sampling_params=params,
                    **scores,
                )
            except (tinker.TinkerError, ValueError) as error:
                raise TrainingError(
                    f"the teacher {self.identity} could not score a sequence of "
                    f"{placed.sequence.length} tokens: {service_message(error)}"
                ) from error
        self.num_scored += 1
        return response

    def _key(self, placed: PlacedSequence, count: int, kind: str) -> bytes:
        """Return a digest of the teacher, the request and what the teacher sees."""
        digest = hashlib.sha256(f"{self.identity}\n{kind}\n{count}\n".encode())
        for chunk in placed.sequence.chunks:
            tokens = getattr(chunk, "tokens", None)
            if tokens is None:
                digest.update(chunk.model_dump_json().encode())
            else:
                digest.update(np.asarray(tokens, np.int64).tobytes())
        digest.update(b"\n" + np.asarray(placed.tokens_n, np.int64).tobytes())
        return digest.digest()


async def open_teacher(
    service_client: tinker.ServiceClient,
    config: TeacherConfig,
    *,
    student_model: str,
    renderer_name: str | None = None,
    cache: TargetCache | None = None,
    concurrency: int = 64,
    context_windows: dict[str, int] | None = None,
) -> Teacher:
    """Open a teacher, after checks of its tokenizer and its chat format.

    Args:
        service_client: The session.
        config: The teacher.
        student_model: Base model of the student.
        renderer_name: The student's chat format; None: not compared with the teacher's.
        cache: Targets that were computed before.
        concurrency: Maximum number of requests at a time.
        context_windows: Maximum tokens of a sequence, by base model.

    Raises:
        ConfigurationError: if the service does not have the teacher, or its tokenizer or chat
            format differs from the student's.
    """
    import tinker

    path = config.load_checkpoint_path
    base_model = config.base_model
    try:
        if path is None:
            source = {"base_model": base_model}
        else:
            source = {"model_path": path}
            run = await rest_client_of(service_client).get_training_run_by_tinker_path(path)
            base_model = run.base_model
        await asyncio.to_thread(check_same_tokenizer, student_model, base_model)
        client = await create_client(service_client.create_sampling_client, **source)
    except (tinker.TinkerError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise missing_teacher(config, error) from error
    if renderer_name is not None:
        found = await _find_format(service_client, config, base_model, student_model, renderer_name)
        who = config.identity
        await asyncio.to_thread(check_same_format, student_model, renderer_name, found, who)
    return Teacher(
        client,
        config.identity,
        cache=cache,
        concurrency=concurrency,
        context_window=(context_windows or {}).get(base_model),
    )


async def _find_format(
    service_client: tinker.ServiceClient,
    config: TeacherConfig,
    base_model: str,
    student_model: str,
    student_format: str,
) -> str:
    """Return the chat format of a teacher; the student's if nothing says otherwise."""
    if config.renderer_name is not None:
        return config.renderer_name
    if config.load_checkpoint_path is not None:
        recorded = await checkpoint_utils.get_renderer_name_from_checkpoint_async(
            service_client, config.load_checkpoint_path
        )
        if recorded is not None:
            return recorded
    if base_model == student_model:
        return student_format
    return find_unsuitable_format(student_format, base_model) or student_format


def trained_positions(values: np.ndarray, *, where: str) -> np.ndarray:
    """Return the positions with a value other than 0, int64 [n].

    Args:
        values: Weights or mask of a datum, [N].
        where: Names the datum in the error.

    Raises:
        DataValidationError: if there is none.
    """
    positions_n = np.flatnonzero(values)
    if not len(positions_n):
        raise DataValidationError(
            f"{where}: no token is trained; use a larger max_length, or leave the row out."
        )
    return positions_n


def missing_teacher(config: TeacherConfig, error: Exception) -> ConfigurationError:
    """Return the error for a teacher that the service does not have."""
    return ConfigurationError(
        f"the service does not have the teacher {config.identity}: {service_message(error)} Use a "
        "base model that it offers, or the sampler_path of a run in its checkpoints.jsonl."
    )


async def open_teachers(
    run: Run[Any],
    configs: Sequence[TeacherConfig],
    *,
    cache: TargetCache | None = None,
    concurrency: int = 64,
    count: int = 0,
    count_name: str = "topk",
    kind: TargetKind = "top",
    max_context_length: int | None = None,
) -> list[Teacher]:
    """Open the teachers of a run that has begun; equal teachers are opened once.

    Args:
        run: The run.
        configs: The teachers.
        cache: Targets that were computed before.
        concurrency: Maximum number of requests to a teacher at a time.
        count: Tokens per position that the run will ask for; every teacher must give so many.
        count_name: Setting that gives `count`, for messages.
        kind: Which tokens these are.
        max_context_length: Maximum tokens of a sequence, if that is less than the model's.

    Raises:
        ConfigurationError: if the service does not have a teacher, or its tokenizer or chat format
            differs from the student's.
    """
    capabilities = await asyncio.to_thread(run.connection.capabilities)
    windows = {
        str(model.model_name): int(length)
        for model in capabilities.supported_models
        if (length := getattr(model, "max_context_length", None))
    }
    opened: dict[str, Teacher] = {}
    for config in configs:
        if config.identity not in opened:
            opened[config.identity] = await open_teacher(
                run.service_client,
                config,
                student_model=run.config.model_name,
                renderer_name=run.config.renderer_name,
                cache=cache,
                concurrency=concurrency,
                context_windows=windows,
            )
    if max_context_length is not None:
        for teacher in opened.values():
            teacher.context_window = min(
                max_context_length, teacher.context_window or max_context_length
            )
    await asyncio.gather(*(teacher.check(count, kind, count_name) for teacher in opened.values()))
    return [opened[config.identity] for config in configs]


def _only_last(placed: PlacedSequence) -> dict[str, Any]:
    """Ask for prompt scores from the first trained token on, if the SDK can say so.

    The service then reuses the computation of a prompt that several requests share.
    """
    options: dict[str, Any] = {"include_prompt_logprobs": True}
    if can_score_last_tokens():
        options["prompt_logprobs_last_n"] = placed.num_scored
    return options


def _prompt_logprobs(response: tinker.SampleResponse) -> np.ndarray:
    """Return the log probabilities of all prompt tokens; nan where there is none."""
    found = response.prompt_logprobs or []
    return np.array([np.nan if value is None else value for value in found], np.float64)


def _top_arrays(response: tinker.SampleResponse, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the top tokens of all prompt positions and their logprobs, [P, K] each."""
    arrays = getattr(response, "topk_prompt_logprobs_np", None)
    if arrays is not None:
        return arrays.token_ids.astype(np.int32), arrays.logprobs.astype(np.float32)
    rows = response.topk_prompt_logprobs
    if rows is None:
        raise TrainingError("the service did not return topk_prompt_logprobs; use another service.")
    tokens = np.zeros((len(rows), count), np.int32)
    logprobs = np.full((len(rows), count), -99999.0, np.float32)
    for index, row in enumerate(rows):
        for column, (token, logprob) in enumerate(row or []):
            tokens[index, column], logprobs[index, column] = token, logprob
    return tokens, logprobs
