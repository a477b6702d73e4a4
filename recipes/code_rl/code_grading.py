"""The name under which programs of the Tinker cookbook import `deepcoder_grading`."""

from .deepcoder_grading import *  # noqa: F403
