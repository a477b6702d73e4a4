"""RLHF: a supervised stage, a reward model, and reinforcement learning against it."""
