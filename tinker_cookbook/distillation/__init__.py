"""Distillation: train a student model to give the probabilities of a teacher model."""
