"""Earlier name of `tinker_cookbook.utils.sdk_compat`, which copied recipes import."""

from tinker_cookbook.utils.sdk_compat import *  # noqa: F403
