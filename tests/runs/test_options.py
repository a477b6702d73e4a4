"""Settings that the model's context refuses."""

from types import SimpleNamespace

import pytest

from tinker_cookbook.exceptions import ConfigurationError
from tinker_cookbook.runs.options import check_row_length


def settings_of(max_length: int | None) -> list[SimpleNamespace]:
    """A recipe's settings, and those of two loops, one with several data sets."""
    recipe = SimpleNamespace(max_length=max_length)
    loop = SimpleNamespace(dataset_builder=SimpleNamespace(common_config=recipe))
    return [recipe, loop, SimpleNamespace(dataset_configs=[SimpleNamespace(), loop])]


def test_rows_may_be_as_long_as_the_model_reads():
    for settings in settings_of(101):  # the last token is only a target
        check_row_length(settings, "m", 100)
    for settings in settings_of(102):
        with pytest.raises(ConfigurationError, match=r"max_length=102 .* use max_length=100 or"):
            check_row_length(settings, "m", 100)


def test_nothing_is_refused_where_no_limit_is_known():
    for settings in settings_of(10**9):
        check_row_length(settings, "m", None)
    for settings in settings_of(None):
        check_row_length(settings, "m", 100)
    check_row_length(SimpleNamespace(), "m", 100)
