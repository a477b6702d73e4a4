"""Draft tokens come from the sequence itself, and pause where they are rejected."""

from __future__ import annotations

from itertools import pairwise

from tinker_cookbook.local.engine.sampling.speculation import Drafter


def test_what_followed_the_last_tokens_before_is_proposed():
    drafter = Drafter()
    assert drafter.propose([1, 2, 3, 4, 5], 3) == []
    assert drafter.propose([1, 2, 3, 4, 5, 1, 2, 3], 3) == [4, 5, 1]
    assert drafter.propose([1, 2, 3, 4, 5, 1, 2, 3], 1) == [4]
    assert drafter.propose([1, 2, 3, 4, 5, 1, 2, 3], 0) == []


def test_the_latest_occurrence_counts():
    drafter = Drafter()
    assert drafter.propose([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 1) == [8]


def test_rejected_drafts_lead_to_longer_and_longer_pauses_and_accepted_ones_end_them():
    drafter, tokens, tried = Drafter(), [1, 2, 3, 4] * 3, []
    while len(tokens) < 600:
        if drafter.propose(tokens, 2):
            tried.append(len(tokens))
            drafter.learn(len(tokens), 0)
        tokens += [1, 2, 3, 4]
    assert len(tried) < 12
    gaps = [later - earlier for earlier, later in pairwise(tried)]
    assert max(gaps) >= 128
    drafter.learn(len(tokens), 5)
    assert drafter.propose(tokens, 2) == []  # still in the pause after the last miss
    tokens += [1, 2, 3, 4] * 40
    for _ in range(5):
        assert drafter.propose(tokens, 2) == [1, 2]
        drafter.learn(len(tokens), 2)
        tokens += [1, 2, 3, 4]
