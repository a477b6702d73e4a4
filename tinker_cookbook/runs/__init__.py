"""A run: its settings, its directory, its training client, its checkpoints and its report.

`open_run` opens all of it; the train loops of `supervised/`, `rl/` and `preference/` start there.
"""
