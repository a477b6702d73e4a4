"""Twenty questions."""
