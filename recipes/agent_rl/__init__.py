"""Reinforcement learning of the model under an agent that knows nothing of the training."""
