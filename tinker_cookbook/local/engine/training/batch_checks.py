"""Checks of a training request's data and loss, made before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from tinker_cookbook.local.engine.csr import to_dense
from tinker_cookbook.local.engine.loss_graph import LossGraph
from tinker_cookbook.local.engine.model.pack import CheckedDatum
from tinker_cookbook.local.engine.training.losses import CUSTOM, LOSSES, UNAVAILABLE, Loss, Setting
from tinker_cookbook.local.engine.types import ImageInput, LossSpec, SparseRows, TrainDatum
from tinker_cookbook.local.errors import UserError
from tinker_cookbook.utils.nearest_name import nearest_name

__all__ = ["CheckedDatum", "check_batch", "check_loss"]


def check_loss(spec: LossSpec) -> tuple[Loss, dict[str, float]]:
    """Return the loss and its complete settings.

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
    if spec.name in UNAVAILABLE:
        raise UserError(
            f"loss_fn={spec.name!r} is not available here: {UNAVAILABLE[spec.name]}; "
            f"use one of {', '.join(LOSSES)}"
        )
    loss = LOSSES.get(spec.name)
    if loss is None:
        raise UserError(f"loss_fn={spec.name!r} is unknown; {_hint(spec.name, LOSSES)}")
    config = {name: setting.default for name, setting in loss.settings.items()}
    for key, value in spec.config.items():
        setting = loss.settings.get(key)
        if setting is None:
            accepted = _hint(key, config) if config else "this loss has no settings"
            raise UserError(f"loss_fn_config has {key!r}, unknown to {spec.name}; {accepted}")
        config[key] = _check_setting(key, value, setting)
    if loss.ordered is not None:
        low, high = loss.ordered
        if config[low] > config[high]:
            raise UserError(
                f"{low}={config[low]} is above {high}={config[high]}; the first must not be larger"
            )
    return loss, config


def _check_setting(key: str, value: float | str, setting: Setting) -> float:
    is_number = not isinstance(value, bool | str) and math.isfinite(value)
    if is_number and setting.low <= float(value) <= setting.high:
        return float(value)
    if math.isinf(setting.high):
        accepted = f"a finite number >= {setting.low:g}"
    else:
        accepted = f"a number from {setting.low:g} to {setting.high:g}"
    raise UserError(f"loss_fn_config {key}={value!r} is not usable; it must be {accepted}")


def _hint(name: str, known: Collection[str]) -> str:
    near = nearest_name(name, known)
    nearest = f" (did you mean {near!r}?)" if near is not None else ""
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
    """Return every datum of a request, dense and checked.

    Args:
        graph: the uploaded loss where `loss_name` is `custom`.
        count_image_tokens: counts the positions of an image, or raises a UserError that begins with
            the given place; None for a model that reads text only.

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
    """Check the inputs that an uploaded loss declares."""
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
    """Check the inputs that a loss of `LOSSES` declares."""
    loss = LOSSES[loss_name]
    given = datum.loss_inputs
    _check_names(given.keys(), where, loss_name, loss)
    num_tokens = datum.tokens.size
    targets = _check_targets(given["target_tokens"], num_tokens, where, vocab_size)
    if targets.ndim == 2 and not loss.multi_target:
        raise UserError(
            f"{where}: target_tokens has shape {list(targets.shape)}; {loss_name} takes one "
            f"target per position, shape [{num_tokens}]"
        )
    types = {**loss.inputs, **dict.fromkeys(loss.per_token_settings, "float32")}
    inputs = {
        name: _check_values(given[name], f"{where}: {name}", targets, dtype)
        for name, dtype in types.items()
        if name in given
    }
    low, high = (inputs.get(name) for name in loss.ordered or ("", ""))
    if loss.ordered is not None and low is not None and high is not None and (low > high).any():
        raise UserError(f"{where}: {loss.ordered[0]} is above {loss.ordered[1]} somewhere")
    return CheckedDatum(
        tokens=datum.tokens,
        targets=targets.reshape(num_tokens, -1).astype(np.int64, copy=False),
        inputs=inputs,
        is_flat=targets.ndim == 1,
        images=datum.images,
    )


def _check_names(given: Collection[str], where: str, loss_name: str, loss: Loss) -> None:
    """Refuse inputs that no loss reads, and a datum that lacks one of this loss.

    Inputs of other losses are accepted and ignored, so one datum can serve several losses.
    """
    known = {"target_tokens"}
    for other in LOSSES.values():
        known |= {*other.inputs, *other.per_token_settings}
    unknown = sorted(set(given) - known)
    if unknown:
        raise UserError(
            f"{where}: loss_fn_inputs has {unknown[0]!r}, which no loss reads; "
            f"{_hint(unknown[0], known)}"
        )
    needed = ("target_tokens", *loss.inputs)
    missing = [name for name in needed if name not in given]
    if missing:
        raise UserError(
            f"{where}: loss_fn_inputs lacks {missing[0]!r}; {loss_name} needs {', '.join(needed)}"
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


def _check_values(
    given: np.ndarray | SparseRows, what: str, targets: np.ndarray, dtype: str
) -> np.ndarray:
    """Return an input as [N, K] of its declared type."""
    values = _dense(given, what)
    if values.shape != targets.shape:
        raise UserError(
            f"{what} has shape {list(values.shape)} and target_tokens {list(targets.shape)}; "
            "they must be equal"
        )
    kind = np.floating if dtype == "float32" else np.integer
    if not np.issubdtype(values.dtype, kind):
        raise UserError(f"{what} has dtype {values.dtype}; {dtype} is expected")
    finite = np.isfinite(values)
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), values.shape)
        position = ", ".join(str(int(axis)) for axis in place)
        raise UserError(f"{what}[{position}]={values[place]} is not finite; send a number")
    return values.reshape(values.shape[0], -1).astype(dtype, copy=False)


def _dense(given: np.ndarray | SparseRows, what: str) -> np.ndarray:
    return to_dense(given, what) if isinstance(given, SparseRows) else given
