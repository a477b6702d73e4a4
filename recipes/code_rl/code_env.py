"""The name under which programs of the Tinker cookbook import `deepcoder`."""

from .deepcoder import *  # noqa: F403
