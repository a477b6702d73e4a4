"""Chat data sets for supervised training."""
