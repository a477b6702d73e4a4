"""Public names of the store of evaluations, which is in `eval`."""

from tinker_cookbook.eval.eval_store import EvalStore, RunMetadata

__all__ = ["EvalStore", "RunMetadata"]
