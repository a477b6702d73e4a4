"""Earlier name of `tinker_cookbook.runs.report`."""

from tinker_cookbook.runs.report import *  # noqa: F403
