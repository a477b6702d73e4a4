"""Check the data of a training request before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tinker_cookbook.local.engine.csr import to_dense
from tinker_cookbook.local.engine.loss_graph import LossGraph
from tinker_cookbook.local.engine.model.pack import CheckedDatum
from tinker_cookbook.local.engine.training.losses import CUSTOM, LOSSES, Loss
from tinker_cookbook.local.engine.types import ImageInput, LossSpec, SparseRows, TrainDatum
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["CheckedDatum", "check_batch", "check_loss"]

_KNOWN_INPUTS = {"target_tokens"} | {
    name for loss in LOSSES.values() for name in (*loss.required_inputs, *loss.optional_inputs)
}


def check_loss(spec: LossSpec) -> tuple[Loss, dict[str, float]]:
    """The loss function and its complete settings.

    Raises:
        UserError: if the loss or a setting is unknown, or a setting has an unusable value.
    """
    if spec.name == "custom":
        if spec.graph is None:
            raise UserError(
                "loss_fn='custom' names no loss; make one with create_custom_loss and pass its "
                "handle to forward_backward_custom"
            )
        return CUSTOM, {}
    if spec.name == "stable_reinforce":
        raise UserError(
            "loss_fn='stable_reinforce' is not available here: its formula is not public; "
            f"use one of {', '.join(LOSSES)}"
        )
    loss = LOSSES.get(spec.name)
    if loss is None:
        raise UserError(f"loss_fn={spec.name!r} is unknown; {_hint(spec.name, LOSSES)}")
    config = dict(loss.defaults)
    for key, value in spec.config.items():
        if key not in config:
            accepted = _hint(key, config) if config else "this loss has no settings"
            raise UserError(f"loss_fn_config has {key!r}, unknown to {spec.name}; {accepted}")
        if isinstance(value, bool | str) or not 0 <= value < math.inf:
            raise UserError(
                f"loss_fn_config {key}={value!r} is not usable; it must be a finite number >= 0"
            )
        config[key] = float(value)
    if config.get("clip_low_threshold", 0.0) > config.get("clip_high_threshold", math.inf):
        raise UserError(
            f"clip_low_threshold={config['clip_low_threshold']} is above clip_high_threshold="
            f"{config['clip_high_threshold']}; they bound the ratio from below and above"
        )
    return loss, config


def _hint(name: str, known: Mapping[str, object] | set[str]) -> str:
    near = nearest_name(name, known)
    nearest = f" (did you mean {near!r}?)" if near else ""
    return f"use one of {', '.join(sorted(known))}{nearest}"


def check_batch(
    data: Sequence[TrainDatum],
    loss_name: str,
    *,
    vocab_size: int,
    max_tokens: int,
    graph: LossGraph | None = None,
    count_image_tokens: Callable[[ImageInput, str], int] | None = None,
) -> list[CheckedDatum]:
    """Every datum of a request, dense and checked; `graph` is the loss where it is `custom`.

    Args:
        count_image_tokens: positions that an image takes, or a UserError that begins with the given
            place; None for a model that reads text only.

    Raises:
        UserError: naming the datum, the field and the value at fault.
    """
    if not data:
        raise UserError("data is empty; send at least one datum")
    checked = []
    for index, datum in enumerate(data):
        where = f"data[{index}]"
        _check_tokens(datum, where, vocab_size, max_tokens)
        _check_images(datum, where, count_image_tokens)
        if graph is not None:
            checked.append(_check_graph_inputs(datum, where, graph, vocab_size))
        else:
            checked.append(_check_inputs(datum, where, loss_name, vocab_size))
    return checked


def _check_tokens(datum: TrainDatum, where: str, vocab_size: int, max_tokens: int) -> None:
    tokens = datum.tokens
    if tokens.ndim != 1 or tokens.size == 0:
        raise UserError(f"{where}: model_input has no tokens; send at least one")
    if tokens.size > max_tokens:
        raise UserError(
            f"{where}: model_input has {tokens.size} tokens and the model's context is "
            f"{max_tokens}; shorten the sequence"
        )
    _check_ids(tokens, f"{where}: model_input", vocab_size)


def _check_images(
    datum: TrainDatum, where: str, count_tokens: Callable[[ImageInput, str], int] | None
) -> None:
    if datum.images and count_tokens is None:
        raise UserError(
            f"{where}: model_input holds an image, and this model reads text only; "
            "remove the image or use a model with vision"
        )
    for number, image in enumerate(datum.images):
        assert count_tokens is not None, "checked above"
        count_tokens(image, f"{where}: image {number} of model_input")


def _check_ids(ids: np.ndarray, what: str, vocab_size: int) -> None:
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        position = int(np.argmax(ids.reshape(ids.shape[0], -1).min(axis=1) < 0))
        if low >= 0:
            position = int(np.argmax(ids.reshape(ids.shape[0], -1).max(axis=1) >= vocab_size))
        raise UserError(
            f"{what}: token id {wrong} at position {position} is out of range; "
            f"the vocabulary has ids 0 to {vocab_size - 1}"
        )


def _check_graph_inputs(
    datum: TrainDatum, where: str, graph: LossGraph, vocab_size: int
) -> CheckedDatum:
    given = datum.loss_inputs
    if "target_tokens" not in given:
        raise UserError(f"{where}: loss_fn_inputs lacks 'target_tokens', which every loss needs")
    targets = _check_targets(given["target_tokens"], datum.tokens.size, where, vocab_size)
    if targets.ndim != graph.inputs[0].rank:
        raise UserError(
            f"{where}: target_tokens has shape {list(targets.shape)}, but loss {graph.name!r} "
            f"declared logprobs with rank {graph.inputs[0].rank}"
        )
    values: dict[str, np.ndarray] = {}
    for entry in graph.inputs[1:]:
        if entry.name not in given:
            raise UserError(
                f"{where}: loss_fn_inputs lacks {entry.name!r}, which loss {graph.name!r} reads"
            )
        value = _dense(given[entry.name], f"{where}: {entry.name}")
        if entry.rank == 0 and value.size == 1:
            value = value.reshape(())
        if value.ndim != entry.rank:
            raise UserError(
                f"{where}: {entry.name} has shape {list(value.shape)}, but loss {graph.name!r} "
                f"declared it with rank {entry.rank}"
            )
        values[entry.name] = value
    targets_NK = targets.reshape(len(targets), -1).astype(np.int64, copy=False)
    return CheckedDatum(datum.tokens, targets_NK, {}, targets.ndim == 1, values, datum.images)


def _check_inputs(datum: TrainDatum, where: str, loss_name: str, vocab_size: int) -> CheckedDatum:
    loss = LOSSES[loss_name]
    given = datum.loss_inputs
    unknown = sorted(set(given) - _KNOWN_INPUTS)
    if unknown:
        raise UserError(
            f"{where}: loss_fn_inputs has {unknown[0]!r}, which no loss reads; "
            f"{_hint(unknown[0], _KNOWN_INPUTS)}"
        )
    missing = [n for n in ("target_tokens", *loss.required_inputs) if n not in given]
    if missing:
        raise UserError(
            f"{where}: loss_fn_inputs lacks {missing[0]!r}; {loss_name} needs "
            f"{', '.join(('target_tokens', *loss.required_inputs))}"
        )
    num_tokens = datum.tokens.size
    targets = _check_targets(given["target_tokens"], num_tokens, where, vocab_size)
    if targets.ndim == 2 and not loss.multi_target:
        raise UserError(
            f"{where}: target_tokens has shape {list(targets.shape)}; {loss_name} takes one "
            f"target per position, shape [{num_tokens}]"
        )
    names = [n for n in (*loss.required_inputs, *loss.optional_inputs) if n in given]
    inputs = {name: _check_values(given[name], f"{where}: {name}", targets) for name in names}
    low, high = (inputs.get(f"clip_{side}_threshold") for side in ("low", "high"))
    if low is not None and high is not None and (low > high).any():
        raise UserError(f"{where}: clip_low_threshold is above clip_high_threshold somewhere")
    return CheckedDatum(
        tokens=datum.tokens,
        targets=targets.reshape(num_tokens, -1).astype(np.int64, copy=False),
        inputs=inputs,
        is_flat=targets.ndim == 1,
        images=datum.images,
    )


def _check_targets(
    given: np.ndarray | SparseRows, num_tokens: int, where: str, vocab_size: int
) -> np.ndarray:
    targets = _dense(given, f"{where}: target_tokens")
    if not np.issubdtype(targets.dtype, np.integer):
        raise UserError(f"{where}: target_tokens has dtype {targets.dtype}; int64 is expected")
    if targets.ndim not in (1, 2) or targets.shape[0] != num_tokens or targets.size == 0:
        raise UserError(
            f"{where}: target_tokens has shape {list(targets.shape)} and model_input "
            f"{num_tokens} tokens; the shape must be [{num_tokens}] or [{num_tokens}, K]"
        )
    _check_ids(targets, f"{where}: target_tokens", vocab_size)
    return targets


def _check_values(given: np.ndarray | SparseRows, what: str, targets: np.ndarray) -> np.ndarray:
    values = _dense(given, what)
    if values.shape != targets.shape:
        raise UserError(
            f"{what} has shape {list(values.shape)} and target_tokens {list(targets.shape)}; "
            "they must be equal"
        )
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{what} has dtype {values.dtype}; float32 is expected")
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), values.shape)
        position = ", ".join(str(int(axis)) for axis in place)
        raise UserError(f"{what}[{position}]={values[place]} is not finite; send a number")
    return values.reshape(values.shape[0], -1).astype(np.float32, copy=False)


def _dense(given: np.ndarray | SparseRows, what: str) -> np.ndarray:
    return to_dense(given, what) if isinstance(given, SparseRows) else given
