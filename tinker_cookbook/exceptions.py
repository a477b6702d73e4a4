"""The errors that the toolkit raises on purpose.

Each class also derives from the built-in error that a caller would expect, so `except ValueError`
works. Messages have the form `NAME=VALUE PROBLEM; WHAT IS ACCEPTED. HOW TO FIX`.
"""

__all__ = [
    "AllTrajectoriesFailedError",
    "BenchmarkNotFoundError",
    "CheckpointError",
    "ConfigurationError",
    "DataError",
    "DataFormatError",
    "DataValidationError",
    "EvalError",
    "EvalGradingError",
    "EvalTimeoutError",
    "RendererError",
    "SandboxError",
    "TinkerCookbookError",
    "TrainingError",
    "WeightsAdapterError",
    "WeightsDownloadError",
    "WeightsError",
    "WeightsMergeError",
]


class TinkerCookbookError(Exception):
    """Base class of all errors below."""


class ConfigurationError(TinkerCookbookError, ValueError):
    """A setting, argument or environment variable is unusable."""


class DataError(TinkerCookbookError, ValueError):
    """Input data is unusable."""


class DataFormatError(DataError):
    """A file does not have the expected format."""


class DataValidationError(DataError):
    """Well-formed data contains a value that is not accepted."""


class RendererError(TinkerCookbookError, ValueError):
    """A conversation cannot be rendered in the chosen format."""


class TrainingError(TinkerCookbookError, RuntimeError):
    """A train loop cannot continue."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, found or read."""


class AllTrajectoriesFailedError(TrainingError):
    """Every trajectory of a group failed, so nothing is left to train on."""


class WeightsError(TinkerCookbookError):
    """Base class of errors about model weights and adapters."""


class WeightsDownloadError(WeightsError, RuntimeError):
    """Weights could not be obtained."""


class WeightsMergeError(WeightsError, ValueError):
    """An adapter cannot be merged into its base model."""


class WeightsAdapterError(WeightsError, ValueError):
    """An adapter cannot be converted."""


class SandboxError(TinkerCookbookError, RuntimeError):
    """A sandbox itself failed, not the program that runs in it."""


class EvalError(TinkerCookbookError, RuntimeError):
    """An evaluation failed."""


class EvalTimeoutError(EvalError, TimeoutError):
    """An evaluation took longer than allowed."""


class EvalGradingError(EvalError):
    """An answer could not be graded."""


class BenchmarkNotFoundError(EvalError, KeyError):
    """No benchmark has this name."""
