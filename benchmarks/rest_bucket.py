"""Compare the rest bucket with renormalizing where the KL over the whole vocabulary is exact.

    python benchmarks/rest_bucket.py

Teacher and student are linear: 8 features, 40 tokens. Both objectives train the student on the same
256 positions with Adam, from the teacher's K most likely tokens. The KL is that of 256 other
positions, summed over all tokens. Seconds, without a service.
"""

from __future__ import annotations

import numpy as np

from tinker_cookbook.distillation.objectives import forward_kl, forward_kl_renormalized

TOKENS, FEATURES, POSITIONS = 40, 8, 256
SHOWN = (10, 30, 100, 300, 1000)
RATE, SEEDS = 0.03, 3
OBJECTIVES = ("renormalized", "forward_kl")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def train(objective: str, count: int, seed: int) -> list[tuple[float, float, float]]:
    """Train one student.

    Args:
        objective: One of `OBJECTIVES`.
        count: K, the number of targets per position.
        seed: Decides the teacher and the positions.

    Returns:
        At each of the steps `SHOWN`: the held-out KL over the whole vocabulary, the student's mass
        on the K tokens of the training positions, and the teacher's.
    """
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 3 / FEATURES**0.5, (FEATURES, TOKENS))
    inputs, held_out = rng.normal(0, 1, (2, POSITIONS, FEATURES))
    teacher, held_out_teacher = log_softmax(inputs @ weights), log_softmax(held_out @ weights)
    ids = np.argsort(-teacher, -1)[:, :count]
    targets = np.take_along_axis(teacher, ids, -1)
    student = np.zeros_like(weights)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    rows = []
    for step in range(1, SHOWN[-1] + 1):
        found = log_softmax(inputs @ student)
        known = np.take_along_axis(found, ids, -1)
        if objective == "renormalized":
            by_target = forward_kl_renormalized(targets)
        else:
            by_target = forward_kl(known, targets).weights_TK
        by_token = np.zeros_like(found)
        np.put_along_axis(by_token, ids, -by_target, -1)
        by_token -= np.exp(found) * by_token.sum(-1, keepdims=True)  # through the softmax
        gradient = inputs.T @ by_token / POSITIONS
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        student -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if step in SHOWN:
            difference = held_out_teacher - log_softmax(held_out @ student)
            kl = (np.exp(held_out_teacher) * difference).sum(-1).mean()
            mass = np.exp(np.take_along_axis(log_softmax(inputs @ student), ids, -1)).sum(-1).mean()
            rows.append((float(kl), float(mass), float(np.exp(targets).sum(-1).mean())))
    return rows


def main() -> None:
    """Print both objectives for several K."""
    print("| K | steps | mass (teacher) | renormalized | rest bucket | difference |")
    print("|---|---|---|---|---|---|")
    for count in (2, 4, 8):
        # [objective, seed, step, number]
        found = np.array(
            [[train(name, count, seed) for seed in range(SEEDS)] for name in OBJECTIVES]
        )
        for number, steps in enumerate(SHOWN):
            renormalized, rest = found[:, :, number, 0]
            error = (renormalized - rest).std(ddof=1) / SEEDS**0.5
            masses = found[:, :, number, 1].mean(-1)
            print(
                f"| {count} | {steps} | {masses[0]:.2f} and {masses[1]:.2f} "
                f"({found[0, :, number, 2].mean():.2f}) | {renormalized.mean():.3f} "
                f"| {rest.mean():.3f} | {(renormalized - rest).mean():.3f} ({error:.3f}) |"
            )


if __name__ == "__main__":
    main()
