"""Reinforcement learning in a game for two players."""
