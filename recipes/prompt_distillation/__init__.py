"""Prompt distillation: eight solved examples in the prompt become zero."""
