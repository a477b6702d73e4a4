"""Recipes of distillation: one teacher, several teachers, and given texts."""
