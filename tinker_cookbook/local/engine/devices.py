"""Which device and number format the engine uses when nobody says."""

from __future__ import annotations

import torch

from tinker_cookbook.local.engine.precision import fastest_dtype
from tinker_cookbook.local.errors import UserError

__all__ = ["choose_device", "choose_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str | None) -> torch.device:
    """The named device, or an accelerator if torch sees one, or the CPU."""
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
    """The named format, or bfloat16 where the device multiplies it faster than float32."""
    if name is not None:
        if name not in _DTYPES:
            raise UserError(f"dtype={name!r} is unknown; use one of {', '.join(_DTYPES)}")
        return _DTYPES[name]
    return fastest_dtype(device)
