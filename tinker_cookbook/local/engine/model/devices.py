"""The device and the number format that the engine uses by default, and copies to a device."""

from __future__ import annotations

import numpy as np
import torch

from tinker_cookbook.local.engine.model.number_formats import DTYPE_NAMES, dtype_from_environment
from tinker_cookbook.local.engine.model.precision import fastest_dtype
from tinker_cookbook.local.errors import UserError

__all__ = ["choose_device", "choose_dtype", "to_device"]


def choose_device(name: str | None) -> torch.device:
    """Return the named device; without a name, an accelerator if torch sees one, or the CPU."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"device={name!r} is not usable: {first_line}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the named format; without a name, the environment's or the device's fastest."""
    name = name or dtype_from_environment()
    if name is None:
        return fastest_dtype(device)
    if name not in DTYPE_NAMES:
        raise UserError(f"dtype={name!r} is unknown; use one of {', '.join(DTYPE_NAMES)}")
    return getattr(torch, name)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return the numbers on a device; the processor does not wait until a GPU has them.

    torch keeps the pinned memory until the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
