"""Reward models of two kinds, trained on comparisons."""
