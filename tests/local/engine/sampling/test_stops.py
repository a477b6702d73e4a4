"""Stop rules: tokens, strings over several tokens, and refused values."""

# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import pytest

from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.sampling.stops import build_stop_rule, load_tokenizer
from tinker_cookbook.local.errors import UserError


def rule_for(stop):
    tokenizer = load_tokenizer(str(tiny_model()))
    return build_stop_rule(
        stop, eos_token_ids=(2,), vocab_size=320, get_tokenizer=lambda: tokenizer
    )


def end_of(stop, text: str) -> str | None:
    """The text up to and with the token at which the rule ends it; None if it never does."""
    tokenizer = load_tokenizer(str(tiny_model()))
    matcher = rule_for(stop).matcher()
    token_ids = tokenizer.encode(text).ids
    for count, token in enumerate(token_ids, 1):
        if matcher.ends_at(token):
            return tokenizer.decode(token_ids[:count], skip_special_tokens=False)
    return None


def test_none_means_the_models_own_end_and_an_empty_list_no_end():
    assert rule_for(None).token_ids == {2}
    assert rule_for([]).token_ids == frozenset()
    assert rule_for([7, 9]).token_ids == {7, 9}


@pytest.mark.parametrize("stop", ["fox jumps", "over the", "z", "ö", "你好", "<|im_end|>"])
def test_a_string_ends_the_text_at_the_token_that_completes_it(stop):
    text = "The quick brown fox jumps over the lazy dog. Zwölf 你好，世界<|im_end|> tail"
    found = end_of([stop], text)
    assert found is not None
    assert stop in found
    # One token earlier the string was not complete, so at most one token's text follows it.
    assert stop not in found[: found.index(stop) + len(stop) - 1]
    assert len(found) - found.index(stop) - len(stop) <= 8


def test_the_first_of_several_strings_ends_it_and_others_do_not():
    assert end_of(["dog", "fox"], "The fox and the dog").endswith("fox")
    assert end_of("fox", "The fox and the dog").endswith("fox")
    assert end_of(["cat"], "The fox and the dog") is None


@pytest.mark.parametrize("stop", [["a", 1], [True], [-1], [320], [""], ["x" * 2000], ["a"] * 65])
def test_unusable_stops_are_refused(stop):
    with pytest.raises(UserError, match="stop"):
        rule_for(stop)
