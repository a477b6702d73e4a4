"""A game."""
