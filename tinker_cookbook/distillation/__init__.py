"""Distillation: train a student model to give the probabilities of a teacher model."""

__all__ = ["sdft", "train_off_policy", "train_on_policy"]  # pyright: ignore[reportUnsupportedDunderAll]
