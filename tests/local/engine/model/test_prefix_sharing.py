"""Sequences that begin alike train as they would alone, with fewer tokens through the model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.local.engine.training_data import FORMATS, make_run
from tests.tiny_models import tiny_model
from tinker_cookbook.local.engine.model import attention
from tinker_cookbook.local.engine.model.attention import (
    attention_backward,
    attention_forward,
    paired_attention_backward,
    paired_attention_forward,
)
from tinker_cookbook.local.engine.model.base_model import NativeModel
from tinker_cookbook.local.engine.model.prefix_sharing import (
    Family,
    PrefixSharing,
    find_families,
)
from tinker_cookbook.local.engine.model.transformer import PackedTransformer
from tinker_cookbook.local.engine.training.run import TrainingPass, TrainingRun
from tinker_cookbook.local.engine.types import AdamSpec, LoraSpec, LossSpec, TrainDatum, TrainResult

CPU = torch.device("cpu")


def sequences(*texts: str) -> list[np.ndarray]:
    """One token per letter; '.' stands for 16 times the letter before it."""
    parts = []
    for text in texts:
        tokens: list[int] = []
        for letter in text:
            tokens += [tokens[-1]] * 16 if letter == "." else [ord(letter)]
        parts.append(np.array(tokens, np.int32))
    return parts


def families(*texts: str) -> list[tuple[list[int], int]]:
    found = find_families(sequences(*texts), [1] * len(texts))
    return [(family.members, family.num_shared) for family in found]


def test_a_group_shares_its_prompt() -> None:
    assert families("a.b", "x.y", "a.c", "x.z", "a.d") == [([0, 2, 4], 17), ([1, 3], 17)]


def test_every_sequence_keeps_a_token_of_its_own() -> None:
    assert families("a.", "a.", "a.b") == [([0, 1, 2], 16)]


def test_groups_behind_one_system_prompt_share_more_within_the_group() -> None:
    found = families("s.a..1", "s.b..1", "s.a..2", "s.b..2", "s.a..3")
    assert found == [([0, 2, 4], 17 + 33), ([1, 3], 17 + 33)]


def test_short_beginnings_and_other_kinds_are_not_shared() -> None:
    assert families("abcdefghijklmnop", "abcdefghijklmnox") == [([0], 0), ([1], 0)]
    found = find_families(sequences("a.b", "a.c"), [1, 2])
    assert [family.members for family in found] == [[0], [1]]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 60), st.lists(st.integers(0, 3), max_size=30)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 90),
)
def test_members_of_a_family_begin_alike(
    drawn: list[tuple[int, int, list[int]]], pack_tokens: int
) -> None:
    tokens = [np.array([first] * count + rest, np.int32) for first, count, rest in drawn]
    lengths = [len(part) for part in tokens]
    found = find_families(tokens, [0] * len(tokens))
    parts = [part for family in found for part in family.split(lengths, pack_tokens)]
    for some in (found, parts):
        assert sorted(i for family in some for i in family.members) == list(range(len(tokens)))
        for family in some:
            lender = tokens[family.members[0]][: family.num_shared]
            for member in family.members:
                assert np.array_equal(tokens[member][: family.num_shared], lender)
                assert family.num_shared < lengths[member]
            assert (family.num_shared == 0) == (len(family.members) == 1)
    assert sum(family.num_tokens(lengths) for family in found) <= sum(lengths)


def test_a_large_family_becomes_packs_of_about_equal_size() -> None:
    lengths = [150] * 16
    parts = Family(list(range(16)), 100).split(lengths, 400)
    assert [len(part.members) for part in parts] == [8, 8]
    assert [part.num_tokens(lengths) for part in parts] == [500, 500]


def test_copies_of_a_long_prefix_are_limited() -> None:
    lengths = [3_001] * 100
    parts = Family(list(range(100)), 3_000).split(lengths, 1_024)
    assert max(part.num_keys(lengths) for part in parts) < 40 * 1_024
    assert sum(part.num_tokens(lengths) for part in parts) < 40_000


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_of_copies_are_added_up(axis: int) -> None:
    sharing = PrefixSharing([5, 4, 3, 6], [0, 3, 0, 2], [0, 0, 2, 2], CPU)
    shape = [2, 2, 2]
    shape[axis] = 5 + 1 + 3 + 4
    tokens = torch.randn(shape, requires_grad=True)
    keys = sharing.copy(tokens, axis)
    assert keys.shape[axis] == 18
    gradient = torch.randn_like(keys)
    keys.backward(gradient)
    torch.testing.assert_close(sharing.gather(gradient, axis), tokens.grad)


LAYOUTS = [
    ((40, 33, 20), (0, 30, 0), (0, 0, 2)),
    ((300, 280, 290, 301), (0, 150, 150, 150), (0, 0, 0, 0)),
    ((1300, 1100), (0, 500), (0, 0)),  # backward passes in parts
]


@pytest.mark.parametrize("kind", ["torch", "compiled", "paired"])
@pytest.mark.parametrize(("lengths", "shared", "lenders"), LAYOUTS)
def test_attention_to_a_shared_prefix(
    kind: str,
    lengths: tuple[int, ...],
    shared: tuple[int, ...],
    lenders: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients are those of sequences that are complete."""
    if kind == "torch":
        monkeypatch.setattr(attention, "_kernels", lambda: None)
    elif attention._kernels() is None:
        pytest.skip("no C compiler here")
    sharing = PrefixSharing(lengths, shared, lenders, CPU)
    num_tokens, group, dim = int(sharing.sources.max()) + 1, 2, 16
    torch.manual_seed(0)
    q = torch.randn(2, num_tokens * group, dim) / 4
    k, v = (torch.randn(2, num_tokens, dim).bfloat16().float() for _ in range(2))
    grad = torch.randn(2, num_tokens * group, dim)
    forward, backward = attention_forward, attention_backward
    if kind == "paired":
        forward, backward = paired_attention_forward, paired_attention_backward

    def merged(heads: torch.Tensor) -> torch.Tensor:
        """In the layout of the attended values."""
        if kind != "paired":
            return heads
        by_token = heads.unflatten(1, (-1, group)).transpose(0, 1)
        return by_token.flatten(1).contiguous()

    keys, values = sharing.copy(k, 1), sharing.copy(v, 1)
    out, lse = forward(q, keys, values, lengths, shared)
    q_grad, *kv_grads = backward(merged(grad), q, keys, values, out, lse, lengths, shared)  # type: ignore[arg-type]

    def complete(heads: torch.Tensor) -> torch.Tensor:
        by_token = heads.unflatten(1, (-1, group))
        return sharing.copy(by_token, 1).flatten(1, 2).contiguous()

    # A prefix's own gradient comes from its lender alone.
    only_own = torch.zeros(len(sharing.sources))
    starts = itertools.accumulate((0, *lengths[:-1]))
    for start, length, borrowed in zip(starts, lengths, shared, strict=True):
        only_own[start + borrowed : start + length] = 1
    whole_grad = complete(grad) * only_own.repeat_interleave(group)[:, None]
    whole, whole_lse = forward(complete(q), keys, values, lengths)
    expected = backward(merged(whole_grad), complete(q), keys, values, whole, whole_lse, lengths)  # type: ignore[arg-type]

    exact = kind == "paired"
    assert_alike(merged(complete(unmerged(out, kind, group))), whole, exact=exact)
    chosen = only_own.bool().repeat_interleave(group)
    assert_alike(q_grad, expected[0][:, chosen], exact=False)
    for ours, theirs in zip(kv_grads, expected[1:], strict=True):
        assert_alike(ours, theirs, exact=False)


def unmerged(out: torch.Tensor, kind: str, group: int) -> torch.Tensor:
    if kind != "paired":
        return out
    by_token = out.unflatten(1, (2, group, -1)).transpose(0, 1)
    return by_token.flatten(1, 2).contiguous()


def assert_alike(found: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> None:
    if exact:
        assert torch.equal(found, expected)
    else:
        assert (found - expected).norm() < 1e-4 * expected.norm()


def grouped_data(vocab_size: int) -> list[TrainDatum]:
    """Two groups of replies, a reply that is there twice, and a sequence that shares nothing."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, vocab_size, 30), rng.integers(0, vocab_size, 22)]
    replies = [(0, 9), (1, 5), (0, 17), (1, 12), (0, 1), (1, 5)]
    texts = [np.concatenate([prompts[p], rng.integers(0, vocab_size, n)]) for p, n in replies]
    texts += [texts[0], rng.integers(0, vocab_size, 25)]
    data = []
    for tokens in texts:
        size = len(tokens) - 1
        weights = (rng.standard_normal(size) * (np.arange(size) > 15)).astype(np.float32)
        inputs = {
            "target_tokens": tokens[1:],
            "weights": weights,
            "advantages": weights,
            "logprobs": np.full(size, -5, np.float32),
            "sequence_ratio_mask": (weights != 0).astype(np.float32),
        }
        data.append(TrainDatum(tokens[:-1].astype(np.int32), inputs))
    return data


def with_inputs(data: list[TrainDatum], *names: str) -> list[TrainDatum]:
    kept = ("target_tokens", *names)
    return [TrainDatum(d.tokens, {name: d.loss_inputs[name] for name in kept}) for d in data]


LOSSES = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("advantages", "logprobs"),
    "dro": ("advantages", "logprobs"),
    "gspo": ("advantages", "logprobs", "sequence_ratio_mask"),
}


def compute(
    run: TrainingRun, loss: str, *, share: bool, backward: bool = True
) -> tuple[TrainResult, torch.Tensor]:
    assert isinstance(run.model, NativeModel)
    run.model.shares_prefixes = share
    data = with_inputs(grouped_data(run.model.vocab_size), *LOSSES[loss])
    result = run.forward_backward(data, LossSpec(loss), backward=backward)
    gradient = torch.zeros(1) if run.gradient is None else run.gradient.clone()
    run.optim_step(AdamSpec(learning_rate=0.0))
    return result, gradient


def assert_same_training(run: TrainingRun, loss: str, *, exact: bool, error: float) -> None:
    expected, gradient = compute(run, loss, share=False)
    found, shared_gradient = compute(run, loss, share=True)
    forward, _ = compute(run, loss, share=True, backward=False)
    for ours, again, theirs in zip(
        found.logprobs, forward.logprobs, expected.logprobs, strict=True
    ):
        assert np.array_equal(ours, again)
        if exact:
            assert np.array_equal(ours, theirs)
        else:
            assert np.abs(ours - theirs).mean() < error
    assert (shared_gradient - gradient).norm() < error * gradient.norm()
    assert found.metrics["num_tokens:sum"] == expected.metrics["num_tokens:sum"]
    assert found.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=error)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("pack_tokens", [40, 1024])
@pytest.mark.parametrize("dtype", FORMATS)
def test_groups_train_as_their_sequences_do(
    loss: str, pack_tokens: int, dtype: torch.dtype
) -> None:
    run = make_run(tiny_model("qwen3"), dtype=dtype)
    run.model.pack_tokens = pack_tokens  # type: ignore[misc]
    exact = dtype == torch.bfloat16 and run.model.product_dtype == dtype and is_paired(run)
    assert_same_training(run, loss, exact=exact, error=2e-5 if dtype == torch.float32 else 0.02)


def is_paired(run: TrainingRun) -> bool:
    return isinstance(run.model, NativeModel) and run.model.weights.paired


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("flash", [False, True])
def test_groups_train_alike_without_compiled_kernels(architecture: str, flash: bool) -> None:
    run = make_run(tiny_model(architecture), compiled=False)
    model = run.model
    assert isinstance(model, NativeModel)
    model.transformer = PackedTransformer(model.arch, model.weights, flash=flash)
    assert_same_training(run, "cross_entropy", exact=False, error=2e-5)


def test_a_group_takes_fewer_tokens_and_less_memory() -> None:
    run = make_run(tiny_model("llama"))
    assert isinstance(run.model, NativeModel)
    data = with_inputs(grouped_data(run.model.vocab_size), "weights")
    passes = {}
    for share in (False, True):
        run.model.shares_prefixes = share
        passes[share] = TrainingPass(run, data, LossSpec("cross_entropy"))
    assert passes[True].num_bytes < passes[False].num_bytes
    lengths = [len(datum.tokens) for datum in data]
    tokens = [sum(pack.num_tokens(lengths) for pack in passes[s]._packs) for s in (False, True)]
    assert tokens == [sum(lengths), sum(lengths) - 3 * 29 - 2 * 22]


def test_dropout_is_drawn_for_each_sequence() -> None:
    """With dropout, nothing is shared, so that every sequence drops other inputs."""
    run = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1, dropout=0.3))
    _, gradient = compute(run, "cross_entropy", share=True)
    again = make_run(tiny_model("llama"), LoraSpec(rank=4, seed=1, dropout=0.3))
    _, expected = compute(again, "cross_entropy", share=False)
    assert torch.equal(gradient, expected)
