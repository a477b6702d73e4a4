"""Recipes that learn from comparisons."""
