"""From a model's name to sampled tokens: find the weights and end tokens, sample, stream tokens."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tinker_cookbook.local.engine.sampling.logit_rules import (
    Bias,
    MinP,
    Penalties,
    RepetitionPenalty,
    new_rules,
)
from tinker_cookbook.local.engine.types import (
    ImageInput,
    LogitRule,
    OnToken,
    SampleResult,
    SampleSpec,
)
from tinker_cookbook.local.errors import NotFoundError, ShuttingDownError, UserError
from tinker_cookbook.local.openai_api.codec import TextCodec
from tinker_cookbook.local.openai_api.requests import SamplingChoice
from tinker_cookbook.local.service.protocol.paths import missing_checkpoint, parse_tinker_path
from tinker_cookbook.local.service.threads import TEXTS

if TYPE_CHECKING:
    from tinker_cookbook.local.service.state.core import Service

__all__ = [
    "Codecs",
    "Drawn",
    "Sampling",
    "Target",
    "build_spec",
    "codecs_of",
    "end_token_ids",
    "find_target",
    "with_prompt_scores",
]


TopRow = tuple[np.ndarray, np.ndarray]
"""Token ids and logprobs of the most likely tokens, best first."""
MAX_UNSENT = 2**17
"""Maximum number of tokens that wait for a stream's client. A slower client is disconnected."""
SENT_AT_ONCE = 32
"""Number of tokens that are decoded before other work may run; takes a few milliseconds."""


@dataclass(frozen=True)
class Target:
    """The model or checkpoint that a request names."""

    name: str
    base_model: str
    model_path: str | None


def find_target(service: Service, model: str) -> Target:
    """Look up a base model or a checkpoint.

    Raises:
        NotFoundError: the service has no model or checkpoint of this name.
        UserError: the path is malformed.
    """
    if not model.startswith("tinker://"):
        try:
            return Target(model, service.engine.canonical_name(model, field="model"), None)
        except UserError as error:
            raise NotFoundError(str(error)) from error
    path = parse_tinker_path(model, field="model")
    run = service.store.index.run(path.run_id)
    if run is None or service.store.find(path.run_id, path.segment, path.name) is None:
        raise missing_checkpoint("model", model)
    return Target(model, service.engine.canonical_name(run.base_model), model)


class Codecs:
    """The text codecs of the served models. Each is loaded when it is first needed."""

    def __init__(self) -> None:
        self._loading: dict[str, asyncio.Task[TextCodec]] = {}

    async def get(self, folder: str, vocab_size: int) -> TextCodec:
        """Return the codec of a model folder; UserError if its tokenizer cannot be used."""
        task = self._loading.get(folder)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            loading = TEXTS.run(TextCodec, Path(folder), vocab_size)
            task = self._loading[folder] = asyncio.create_task(loading)
        return await asyncio.shield(task)


_codecs: weakref.WeakKeyDictionary[Service, Codecs] = weakref.WeakKeyDictionary()


def codecs_of(service: Service) -> Codecs:
    """Return the codecs of a service."""
    return _codecs.setdefault(service, Codecs())


def end_token_ids(
    choice: SamplingChoice, eos_token_ids: Sequence[int], turn_end_ids: Sequence[int]
) -> frozenset[int]:
    """Return the tokens that end an answer: the request's, or else those of model and template."""
    if choice.stop_token_ids is not None:
        return frozenset(choice.stop_token_ids)
    return frozenset(eos_token_ids) | frozenset(turn_end_ids)


@dataclass(frozen=True)
class Drawn:
    """One sampled token."""

    index: int
    """Number of the completion; completions of the first prompt come first."""
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at this position, best first."""


class _Feed:
    """Queue of tokens from the engine's thread to a stream, which may be slower."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, int, float, TopRow | None]] = deque()
        self._changed = asyncio.Event()
        self._is_told = False
        self._has_ended = False

    def put(self, index: int, token: int, logprob: float, top: TopRow | None) -> None:
        """Add a token. Called on the engine's thread.

        Raises:
            UserError: too many tokens are waiting.
        """
        if len(self._waiting) >= MAX_UNSENT:
            raise UserError(
                f"the stream's client is {MAX_UNSENT} tokens behind; read faster, or ask for less"
            )
        self._waiting.append((index, token, logprob, top))
        if not self._is_told:
            self._is_told = True
            self._loop.call_soon_threadsafe(self._changed.set)

    def end(self) -> None:
        """Mark the end of the tokens. Called on the event loop."""
        self._has_ended = True
        self._changed.set()

    async def take(self) -> list[Drawn]:
        """Wait for tokens and return some; empty after the end. Always lets other work run."""
        await asyncio.sleep(0)
        while not self._waiting and not self._has_ended:
            self._changed.clear()
            self._is_told = False
            # check again: a token may have been added before the flag was cleared
            if not self._waiting:
                await self._changed.wait()
        count = min(len(self._waiting), SENT_AT_ONCE)
        return [_drawn(*self._waiting.popleft()) for _ in range(count)]


def _drawn(index: int, token: int, logprob: float, top: TopRow | None) -> Drawn:
    ranked = () if top is None else zip(top[0].tolist(), top[1].tolist(), strict=True)
    return Drawn(index, token, logprob, tuple(ranked))


class Sampling:
    """Running requests for completions of one or several prompts."""

    def __init__(
        self,
        results: list[asyncio.Future[SampleResult]],
        specs: list[SampleSpec],
        feed: _Feed,
    ) -> None:
        self.specs = specs
        self._results = results
        self._feed = feed
        self._all = asyncio.gather(*results)
        self._all.add_done_callback(lambda _: feed.end())

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        service: Service,
        target: Target,
        specs: list[SampleSpec],
        *,
        watch: bool,
        client: str = "",
    ) -> AsyncIterator[Sampling]:
        """Start to sample. Leaving the block cancels unfinished requests.

        Args:
            service: the service.
            target: the model or checkpoint.
            specs: one sampling request per prompt.
            watch: whether the caller will read `draws`.
            client: name of the client; clients share the engine evenly.
        """
        feed = _Feed()

        def listen(first: int) -> OnToken:
            def on_token(index: int, token: int, logprob: float, top: TopRow | None = None) -> None:
                feed.put(first + index, token, logprob, top)

            return on_token

        async with service.samplers.borrow(target.base_model, target.model_path) as key:
            first = 0
            results: list[asyncio.Future[SampleResult]] = []
            for spec in specs:
                on_token = listen(first) if watch else None
                worker = service.engine.worker
                future = worker.sample(key, spec, on_token=on_token, client=client)
                results.append(asyncio.wrap_future(future))
                first += spec.num_samples
            sampling = cls(results, specs, feed)
            # otherwise, the request that waits for the results counts as running work itself
            with service.in_flight(sampling._all) if watch else contextlib.nullcontext():
                try:
                    yield sampling
                finally:
                    sampling._cancel()

    def _cancel(self) -> None:
        for result in self._results:
            result.cancel()
        self._all.add_done_callback(_retrieve)

    async def results(self) -> list[SampleResult]:
        """Return the results in the order of the prompts.

        Raises:
            UserError: the engine refused a request.
            ShuttingDownError: the service stopped first.
        """
        await asyncio.wait([self._all])
        if self._all.cancelled():
            raise ShuttingDownError("the service stopped before the answer ended")
        return list(self._all.result())

    async def next_draws(self) -> list[Drawn]:
        """Return the next tokens of any completions; empty when all have finished.

        Raises:
            UserError, ShuttingDownError: as `results`.
        """
        drawn = await self._feed.take()
        if not drawn:
            await self.results()
        return drawn

    async def draws(self, first: list[Drawn]) -> AsyncIterator[list[Drawn]]:
        """Yield all tokens, a few at a time, starting with `first`."""
        drawn = first
        while drawn:
            yield drawn
            drawn = await self.next_draws()


def _retrieve(future: asyncio.Future) -> None:
    """Retrieve the result of a future, so that asyncio does not report an unread error."""
    if not future.cancelled():
        future.exception()


def build_spec(
    choice: SamplingChoice,
    prompt: Sequence[int],
    end_ids: frozenset[int],
    codec: TextCodec,
    *,
    images: Sequence[ImageInput] = (),
    new_grammar_rule: Callable[[], LogitRule] | None = None,
) -> SampleSpec:
    """Return the request to the engine."""
    stop: list[str] | list[int] = sorted(end_ids)
    if choice.stops:
        # the engine takes either texts or ids, so end tokens are given as texts
        stop = [*choice.stops, *(codec.token_text(token) for token in sorted(end_ids))]
    return SampleSpec(
        prompt=np.asarray(prompt, dtype=np.int32),
        num_samples=choice.n,
        max_tokens=1 if choice.max_tokens == 0 else choice.max_tokens,
        temperature=choice.temperature,
        top_k=choice.top_k,
        top_p=choice.top_p,
        seed=choice.seed,
        stop=stop,
        topk_sample_logprobs=choice.top_logprobs or 0,
        images=tuple(images),
        new_rule=new_rules(_rules(choice, prompt, new_grammar_rule)),
    )


def _rules(
    choice: SamplingChoice, prompt: Sequence[int], new_grammar_rule: Callable[[], LogitRule] | None
) -> list[Callable[[], LogitRule]]:
    """Return what makes the rules of a completion, in the order in which they are applied.

    Min-p comes last, because it compares the tokens that the others leave.
    """
    made: list[Callable[[], LogitRule]] = []
    if choice.repetition_penalty != 1:
        made.append(lambda: RepetitionPenalty(choice.repetition_penalty, prompt))
    presence, frequency = choice.presence_penalty, choice.frequency_penalty
    if presence or frequency:
        made.append(lambda: Penalties(presence=presence, frequency=frequency))
    if choice.logit_bias:
        tokens = np.fromiter(choice.logit_bias, np.int64)
        values = np.fromiter(choice.logit_bias.values(), np.float32)
        made.append(lambda: Bias(tokens, values))
    if new_grammar_rule is not None:
        made.append(new_grammar_rule)
    if choice.min_p > 0:
        made.append(lambda: MinP(choice.min_p, choice.temperature))
    return made


def with_prompt_scores(spec: SampleSpec, top_logprobs: int | None) -> SampleSpec:
    """Return the request with the prompt's logprobs added."""
    return replace(spec, prompt_logprobs=True, topk_prompt_logprobs=top_logprobs or 0)
