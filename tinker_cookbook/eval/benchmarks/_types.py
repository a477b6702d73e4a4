"""What benchmarks are made of: settings, trajectories, results, and the class of a benchmark."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypedDict,
    cast,
    runtime_checkable,
)

from tinker_cookbook.exceptions import ConfigurationError, DataFormatError
from tinker_cookbook.rl.types import Env, Logs, Metrics

if TYPE_CHECKING:
    import tinker

    from tinker_cookbook.eval.endpoint import EndpointClient
    from tinker_cookbook.renderers.base import Renderer
    from tinker_cookbook.sandbox import SandboxInterface

__all__ = [
    "METRIC_CONTEXT_OVERFLOW",
    "METRIC_MAX_TOKENS_REACHED",
    "BenchmarkBuilder",
    "BenchmarkConfig",
    "BenchmarkResult",
    "BenchmarkResultDict",
    "Grade",
    "Logs",
    "Metrics",
    "PassAtKScores",
    "ScoringEnv",
    "StoredTrajectory",
    "StoredTrajectoryDict",
    "StoredTurn",
    "StoredTurnDict",
    "TurnRole",
    "is_correct",
]

METRIC_MAX_TOKENS_REACHED = "max_tokens_reached"
METRIC_CONTEXT_OVERFLOW = "context_overflow"
PassAtKScores = dict[int, float]
TurnRole = Literal["user", "assistant", "environment", "grader"]
IfSettingsDiffer = Literal["refuse", "restart"]


class StoredTurnDict(TypedDict):
    """A `StoredTurn` as a JSON object."""

    role: TurnRole
    content: str
    token_count: int
    metadata: dict[str, Any]


class StoredTrajectoryDict(TypedDict):
    """A `StoredTrajectory` as a JSON object."""

    idx: int
    benchmark: str
    example_id: str
    turns: list[StoredTurnDict]
    reward: float
    metrics: Metrics
    logs: Logs
    error: str | None
    time_seconds: float
    sample: int
    prompt_key: str


class BenchmarkResultDict(TypedDict):
    """A `BenchmarkResult` as a JSON object."""

    name: str
    score: float
    num_examples: int
    num_correct: int
    num_errors: int
    num_truncated: int
    metrics: Metrics
    time_seconds: float
    pass_at_k: dict[str, float]
    num_samples: int
    standard_error: float


@dataclass
class BenchmarkConfig:
    """How benchmarks are run."""

    max_examples: int | None = None
    """Number of examples, from the start of the data; None: all."""
    concurrency: int = 64
    """Maximum number of examples at a time."""
    agent_concurrency: int = 8
    """The same for benchmarks with several turns."""
    timeout_seconds: float = 300
    """Time limit of one attempt at an example, including the grading."""
    max_trajectory_tokens: int | None = None
    """Maximum tokens of a prompt and its reply together, for benchmarks with several turns."""
    max_generation_tokens: int | None = None
    """Tokens of that number that are reserved for the reply."""
    max_tokens: int = 32768
    """Maximum tokens per reply."""
    temperature: float = 0.6
    """Sampling temperature; 0 is greedy."""
    context_window: int | None = None
    """Maximum tokens of prompt and reply that the model takes; None: unknown."""
    save_dir: str | None = None
    """Folder for trajectories and results; None: nothing is saved, and nothing resumed."""
    num_samples: int = 1
    """Replies sampled per example, in one request; with 2 or more, pass@k is computed."""
    judge_sampling_client: tinker.SamplingClient | None = None
    judge_renderer: Renderer | None = None
    sandbox_factory: Callable[[], SandboxInterface | Awaitable[SandboxInterface]] | None = None
    """Makes the sandbox in which a reply's program runs; None: a local sandbox."""
    system_prompt: str | None = None
    """System prompt that replaces the benchmark's; an empty text: none."""
    grade_fn: Callable[[str, Logs], float] | None = None
    """Grades the replies instead of the benchmark's grader; 1 is correct."""
    seed: int | None = 0
    """Seed of the sampling; with None, every run samples anew."""
    weights: str | None = None
    """Name of the weights, if the sampling client cannot tell which ones it samples from."""
    data: Mapping[str, str] = field(default_factory=dict)
    """Data per benchmark: a JSONL file, `hub`, or `package`; the default takes what it finds."""
    max_attempts: int = 3
    """Attempts at an example whose sampling fails or takes too long."""
    retry_pause_seconds: float = 1.0
    """Pause before the second attempt; each further pause is twice as long."""
    if_settings_differ: IfSettingsDiffer = "refuse"
    """What to do if `save_dir` holds replies that were sampled or graded with other settings:
    `refuse` raises an error, `restart` moves them aside."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "agent_concurrency", "max_tokens", "num_samples"):
            _check_positive(name, getattr(self, name))
        for name in ("max_examples", "max_attempts", "context_window"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        if not 0 <= self.temperature < math.inf:
            raise ConfigurationError(
                f"temperature={self.temperature} is out of range; use 0 (greedy) or more."
            )
        if self.if_settings_differ not in ("refuse", "restart"):
            raise ConfigurationError(
                f"if_settings_differ={self.if_settings_differ!r} is unknown; use refuse or restart."
            )

    @classmethod
    def for_model(cls, model_name: str, **kwargs: Any) -> BenchmarkConfig:
        """Return a config whose context window is that of the model, if its files tell."""
        if "context_window" not in kwargs:
            kwargs["context_window"] = _context_window(model_name)
        return cls(**kwargs)


@dataclass
class StoredTurn:
    """One message of a trajectory."""

    role: TurnRole
    content: str
    """The text; of a reply, what the grader sees, without thinking and end markers."""
    token_count: int = 0
    """Number of sampled tokens of a reply; 0 for other turns."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Of a reply: `stop_reason`, and `raw`, the decoded tokens, if they differ from the content."""


@dataclass
class StoredTrajectory:
    """One reply to one example, with its grade."""

    idx: int
    """Index of the example."""
    benchmark: str
    example_id: str = ""
    turns: list[StoredTurn] = field(default_factory=list)
    reward: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    logs: Logs = field(default_factory=dict)
    error: str | None = None
    """Why there is no grade; such an example is run again when the evaluation is resumed."""
    time_seconds: float = 0.0
    sample: int = 0
    """Index of the reply among the replies to its example."""
    prompt_key: str = ""
    """Hash of the messages of the prompt; empty if the environment does not give one."""

    @property
    def is_truncated(self) -> bool:
        """Return whether the token limit or the context window cut the reply."""
        cut = (METRIC_MAX_TOKENS_REACHED, METRIC_CONTEXT_OVERFLOW)
        return self.error is None and any(self.metrics.get(name) for name in cut)

    @property
    def reply(self) -> str:
        """Return the text of the last reply; empty if there is none."""
        replies = [turn.content for turn in self.turns if turn.role == "assistant"]
        return replies[-1] if replies else ""

    def to_dict(self) -> StoredTrajectoryDict:
        """Return a JSON object."""
        return cast("StoredTrajectoryDict", dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> StoredTrajectory:
        """Read a JSON object that `to_dict` wrote; unknown keys are ignored.

        Raises:
            DataFormatError: if a key is missing.
        """
        known = {each.name for each in dataclasses.fields(cls)}
        values = {key: value for key, value in d.items() if key in known}
        try:
            values["turns"] = [StoredTurn(**turn) for turn in values.get("turns", [])]
            return cls(**values)
        except TypeError as error:
            raise DataFormatError(f"a stored trajectory cannot be read: {error}") from error


@dataclass
class BenchmarkResult:
    """The scores of one model on one benchmark."""

    name: str
    score: float
    """Share of correct replies; errors are left out, truncated replies count as not correct."""
    num_examples: int
    num_correct: int
    """Number of correct replies."""
    num_errors: int = 0
    """Number of replies without a grade, because of an error or a timeout."""
    num_truncated: int = 0
    """Number of replies that the token limit or the context window cut."""
    metrics: Metrics = field(default_factory=dict)
    time_seconds: float = 0.0
    pass_at_k: PassAtKScores = field(default_factory=dict)
    num_samples: int = 1
    """Replies per example."""
    standard_error: float = 0.0
    """Standard error of the score."""

    @property
    def num_completed(self) -> int:
        """Return the number of replies that are complete and graded."""
        return self.num_examples * self.num_samples - self.num_errors - self.num_truncated

    @property
    def score_completed(self) -> float:
        """Return the share of correct replies among the complete ones."""
        return self.num_correct / self.num_completed if self.num_completed else 0.0

    def to_dict(self) -> BenchmarkResultDict:
        """Return a JSON object."""
        found = dataclasses.asdict(self)
        found["pass_at_k"] = {str(k): value for k, value in self.pass_at_k.items()}
        return cast("BenchmarkResultDict", found)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> BenchmarkResult:
        """Read a JSON object that `to_dict` wrote.

        Raises:
            DataFormatError: if a key is missing or unknown.
        """
        try:
            result = cls(**d)
        except TypeError as error:
            raise DataFormatError(f"a stored result cannot be read: {error}") from error
        result.pass_at_k = {int(k): value for k, value in result.pass_at_k.items()}
        return result


@dataclass(frozen=True)
class Grade:
    """The verdict on one reply."""

    reward: float
    """1 for a correct reply, 0 for a wrong one; values between them are partly correct."""
    metrics: Metrics = field(default_factory=dict)
    """Further numbers, of which the result has the means."""
    logs: Logs = field(default_factory=dict)
    """What the grader found, such as the extracted answer or the reason of a failure."""


@runtime_checkable
class ScoringEnv(Protocol):
    """An environment that computes with the sampling client itself instead of sampling replies."""

    async def score_directly(
        self, sampling_client: tinker.SamplingClient | EndpointClient
    ) -> Grade:
        """Return the grade of the example."""
        ...


class BenchmarkBuilder(ABC):
    """A benchmark: its examples, and how a reply is graded."""

    name: str
    multi_turn: bool = False
    recommended_timeout: float = 300
    recommended_system_prompt: str | None = None
    experimental: bool = False
    requires_sandbox: bool = False
    requires_judge: bool = False
    grader_version: ClassVar[str] = "1"
    """Changed with every change of the grades; stored replies then need a regrade."""

    @abstractmethod
    def make_envs(self, renderer: Renderer, config: BenchmarkConfig) -> Sequence[Env | ScoringEnv]:
        """Return one environment per example, each for one reply.

        It is called once per reply to an example, and must return the same examples each time.
        An environment may have an `example_id`; otherwise its position identifies the example.
        """

    def data_key(self, config: BenchmarkConfig) -> str:
        """Return what identifies the data, so that an evaluation never mixes two versions."""
        del config
        return ""

    async def grade(self, reply: str, logs: Logs, config: BenchmarkConfig) -> Grade:
        """Grade a stored reply again, from its text and its logs.

        Raises:
            ConfigurationError: if the benchmark does not support this.
        """
        raise ConfigurationError(f"benchmark={self.name} has no grader for stored replies.")

    def aggregate(self, rewards: list[float], metrics_list: list[Metrics]) -> BenchmarkResult:
        """Return the result of all graded replies: the share of correct ones, and mean metrics."""
        correct = sum(map(is_correct, rewards))
        metrics: Metrics = {}
        counted = {METRIC_MAX_TOKENS_REACHED, METRIC_CONTEXT_OVERFLOW}  # in `num_truncated`
        for name in sorted({name for each in metrics_list for name in each} - counted):
            values = [float(each[name]) for each in metrics_list if name in each]
            metrics[name] = math.fsum(values) / len(values)
        score = correct / len(rewards) if rewards else 0.0
        return BenchmarkResult(self.name, score, len(rewards), correct, metrics=metrics)


def is_correct(reward: float) -> bool:
    """Return whether a reward is the full one; a partly correct reply is not correct."""
    return reward >= 1.0 - 1e-9


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"{name}={value} is too small; use 1 or more.")


def _context_window(model_name: str) -> int | None:
    """Return the maximum tokens that a model reads, if its config.json can be had."""
    from tinker_cookbook.exceptions import TinkerCookbookError
    from tinker_cookbook.model_files import read_context_window, resolve_model_folder

    try:
        return read_context_window(resolve_model_folder(model_name, weights=False))
    except (TinkerCookbookError, OSError):
        return None
