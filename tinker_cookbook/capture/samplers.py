"""What an endpoint samples from: a sampling client of the SDK, or the policy of a train loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tinker_cookbook.completers import (
    ContextOverflowError,
    StopCondition,
    TokenCompleter,
    TokensWithLogprobs,
)
from tinker_cookbook.exceptions import TrainingError
from tinker_cookbook.utils.sdk_compat import call, service_message

if TYPE_CHECKING:
    import tinker

__all__ = ["ClientSampler", "PolicySampler", "Sampler", "SamplingWishes"]


@dataclass(frozen=True)
class SamplingWishes:
    """What a request asks of the sampler; None: the sampler's own value."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None


class Sampler(Protocol):
    """Continues a prompt of tokens."""

    async def __call__(
        self, prompt: tinker.ModelInput, stop: StopCondition, wishes: SamplingWishes
    ) -> TokensWithLogprobs:
        """Sample one reply."""
        ...


@dataclass(frozen=True)
class ClientSampler:
    """Samples from a sampling client as each request asks."""

    client: tinker.SamplingClient
    max_tokens: int = 1024
    """Maximum tokens of a reply whose request does not name a limit."""
    temperature: float = 1.0
    """Temperature of a request that does not name one."""
    context_window: int | None = None
    """Maximum tokens of prompt and reply together; None: unknown."""

    async def __call__(
        self, prompt: tinker.ModelInput, stop: StopCondition, wishes: SamplingWishes
    ) -> TokensWithLogprobs:
        """Sample one reply.

        Raises:
            ContextOverflowError: the prompt fills the context window.
            TrainingError: the service fails.
        """
        import tinker

        temperature = self.temperature if wishes.temperature is None else wishes.temperature
        params = tinker.SamplingParams(
            max_tokens=self._room(prompt.length, wishes.max_tokens or self.max_tokens),
            stop=stop,
            temperature=temperature,
            top_p=1.0 if wishes.top_p is None else wishes.top_p,
            top_k=-1 if wishes.top_k is None else wishes.top_k,
            seed=wishes.seed,
        )
        try:
            response = await call(
                self.client, "sample", prompt=prompt, num_samples=1, sampling_params=params
            )
        except (tinker.TinkerError, ValueError) as error:
            raise TrainingError(
                f"the service could not sample: {service_message(error)}"
            ) from error
        sequence = response.sequences[0]
        logprobs = sequence.logprobs
        return TokensWithLogprobs(
            tokens=list(sequence.tokens),
            maybe_logprobs=None if logprobs is None else list(logprobs),
            stop_reason=sequence.stop_reason,
            sequence_id=getattr(sequence, "sequence_id", None),
        )

    def _room(self, prompt_length: int, max_tokens: int) -> int:
        if self.context_window is None:
            return max_tokens
        room = self.context_window - prompt_length
        if room < 1:
            raise ContextOverflowError(
                f"prompt of {prompt_length} tokens fills the model's context of "
                f"{self.context_window} tokens, so a reply does not fit. Shorten the prompt."
            )
        return min(max_tokens, room)


@dataclass(frozen=True)
class PolicySampler:
    """Samples from the policy of a train loop.

    The run decides temperature, top-p, top-k and seed, because the samples are trained on. A
    request can only lower the maximum number of tokens.
    """

    policy: TokenCompleter

    async def __call__(
        self, prompt: tinker.ModelInput, stop: StopCondition, wishes: SamplingWishes
    ) -> TokensWithLogprobs:
        """Sample one reply."""
        return await self.policy(prompt, stop, max_tokens=wishes.max_tokens)
