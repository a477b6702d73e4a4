"""Earlier name of `tinker_cookbook.runs.interrupts`, which copied recipes import."""

from tinker_cookbook.runs.interrupts import *  # noqa: F403
