"""Rules change what is drawn, and never the logprobs that are reported."""

from __future__ import annotations

import numpy as np
import pytest

from tests.local.engine.sampling_models import DECODERS, sampled
from tinker_cookbook.local.engine.sampling.logit_rules import (
    Bias,
    MinP,
    Penalties,
    RepetitionPenalty,
    new_rules,
)
from tinker_cookbook.local.engine.types import SampleSpec
from tinker_cookbook.local.errors import UserError

PROMPT = np.array([5, 6, 7, 8], np.int32)


class Dictated:
    """Allows one token at a time: those of a list."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self.added: list[int] = []

    def change(self, logits_V: np.ndarray) -> None:
        kept = logits_V[self.tokens[0]]
        logits_V[:] = -np.inf
        logits_V[self.tokens[0]] = kept

    def add(self, token: int) -> None:
        assert token == self.tokens.pop(0)
        self.added.append(token)


class Broken:
    """A rule that fails."""

    def change(self, logits_V: np.ndarray) -> None:
        raise UserError("the rule is broken")

    def add(self, token: int) -> None:
        raise AssertionError("nothing is drawn")


def changed(rule, logits: list[float]) -> list[float]:
    array = np.array(logits, np.float32)
    rule.change(array)
    return array.tolist()


def test_penalties_count_the_tokens_of_the_completion():
    rule = Penalties(presence=0.5, frequency=0.25)
    assert changed(rule, [1, 2, 3]) == [1, 2, 3]
    for token in (1, 1, 2):
        rule.add(token)
    assert changed(rule, [1, 2, 3]) == [1, 2 - 0.5 - 0.5, 3 - 0.5 - 0.25]


def test_the_repetition_penalty_also_counts_the_prompt():
    rule = RepetitionPenalty(2.0, [0])
    rule.add(2)
    assert changed(rule, [4, 4, -4, -4]) == [2, 4, -8, -4]


def test_a_bias_is_added():
    bias = Bias(np.array([1]), np.array([-100], np.float32))
    assert changed(bias, [1, 2, 3]) == [1, -98, 3]


def test_min_p_compares_with_the_most_likely_token():
    logits = np.log([0.5, 0.3, 0.15, 0.05]).tolist()
    kept = np.isfinite(changed(MinP(0.25, 1.0), logits))
    assert kept.tolist() == [True, True, True, False]
    kept = np.isfinite(changed(MinP(0.25, 0.5), logits))  # shares are 1, 0.36, 0.09, 0.01
    assert kept.tolist() == [True, True, False, False]
    assert np.isfinite(changed(MinP(0.25, 0.0), logits)).tolist() == [True, False, False, False]


def test_rules_are_applied_in_sequence_and_none_is_no_rule():
    assert new_rules([]) is None
    bias = Bias(np.array([0]), np.array([5], np.float32))
    make = new_rules([lambda: bias, lambda: MinP(0.9, 1.0)])
    assert make is not None
    assert np.isfinite(changed(make(), [1, 2, 3])).tolist() == [True, False, False]


@pytest.mark.parametrize("decoder", DECODERS)
def test_forced_tokens_have_the_logprobs_of_the_model(decoder: str):
    wanted = [11, 300, 12, 12, 13, 11, 300, 12, 12, 13, 11, 300]
    model = sampled(decoder=decoder)
    rules: list[Dictated] = []

    def new_rule() -> Dictated:
        rules.append(Dictated(wanted))
        return rules[-1]

    count = len(wanted)
    forced = SampleSpec(
        PROMPT, 2, count, seed=1, stop=[], new_rule=new_rule, topk_sample_logprobs=3
    )
    free = SampleSpec(PROMPT, 2, count, seed=1, stop=[])
    alone = sampled(decoder=decoder).sample(free)[0]
    got, company = model.sample(forced, free)
    whole = np.concatenate([PROMPT, wanted]).astype(np.int32)
    scored = model.sample(SampleSpec(whole, 1, 1, prompt_logprobs=True))[0].prompt_logprobs
    assert scored is not None
    for sequence in got.sequences:
        assert sequence.tokens.tolist() == wanted
        np.testing.assert_allclose(sequence.logprobs, scored[len(PROMPT) :], atol=1e-5)
        assert sequence.topk_logprobs is not None
        assert np.isfinite(sequence.topk_logprobs.logprobs).all()
    # the last token ends the sequence, so the rule does not hear of it
    assert [rule.added for rule in rules] == [wanted[:-1]] * 2
    for mine, other in zip(company.sequences, alone.sequences, strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)
        if decoder == "compiled":
            assert mine.logprobs.tolist() == other.logprobs.tolist()


@pytest.mark.parametrize("decoder", DECODERS)
def test_drafts_do_not_change_what_a_rule_lets_through(decoder: str):
    """A sequence that decodes alone is computed with draft tokens; with company it is not."""

    def spec() -> SampleSpec:
        bias = Bias(np.arange(20, 24), np.full(4, 12, np.float32))
        make = new_rules([lambda: bias, lambda: Penalties(presence=0.0, frequency=0.3)])
        return SampleSpec(PROMPT, 1, 60, seed=3, stop=[], new_rule=make)

    [alone] = sampled(decoder=decoder).sample(spec())
    others = [SampleSpec(PROMPT + 1, 1, 60, seed=n, stop=[]) for n in range(4)]
    together = sampled(decoder=decoder).sample(spec(), *others)[0]
    assert alone.sequences[0].tokens.tolist() == together.sequences[0].tokens.tolist()
    if decoder == "compiled":
        assert alone.sequences[0].logprobs.tolist() == together.sequences[0].logprobs.tolist()


def test_an_error_of_a_rule_ends_only_its_request():
    model = sampled()
    broken = model.start(SampleSpec(PROMPT, 2, 4, new_rule=Broken))
    whole = model.start(SampleSpec(PROMPT, 1, 4, stop=[]))
    [result] = model.run(whole)
    assert len(result.sequences[0].tokens) == 4
    with pytest.raises(UserError, match="the rule is broken"):
        broken.future.result(timeout=0)
