"""Earlier name of `tinker_cookbook.runs.options`."""

from tinker_cookbook.runs.options import *  # noqa: F403
