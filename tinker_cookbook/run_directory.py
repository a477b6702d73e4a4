"""Earlier name of `tinker_cookbook.runs.directory`."""

from tinker_cookbook.runs.directory import *  # noqa: F403
