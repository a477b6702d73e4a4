"""Graders: pure functions from a reply and a reference to a verdict."""
