"""CSR matrices as clients send them: the check of their indices, and the dense form. No torch.

All code that reads such a matrix trusts its indices. They are compared with their bounds before any
differences are taken, since differences of 64-bit numbers can wrap around.
"""

from __future__ import annotations

import numpy as np

from tinker_cookbook.local.engine.types import SparseRows
from tinker_cookbook.local.errors import UserError

__all__ = ["MAX_CELLS", "MAX_COLUMNS", "check_csr", "to_dense"]

MAX_COLUMNS = 1 << 20
MAX_CELLS = 1 << 26
"""Maximum number of cells of one matrix, including cells that are not listed."""


def check_csr(rows: SparseRows, name: str) -> None:
    """Check the shape and the indices.

    Row bounds must rise from 0 to the number of values; column indices must be inside the matrix
    and differ within a row.

    Raises:
        UserError: its message begins with `name`.
    """
    num_rows, num_columns = rows.shape
    fits = 0 <= num_columns <= MAX_COLUMNS and num_rows >= 0 and num_rows * num_columns <= MAX_CELLS
    if not fits:
        raise UserError(
            f"{name} has shape {list(rows.shape)}; at most {MAX_COLUMNS} columns and {MAX_CELLS} "
            "cells fit"
        )
    crow, col = (np.asarray(part) for part in (rows.crow_indices, rows.col_indices))
    num_values = np.asarray(rows.values).size
    if crow.shape != (num_rows + 1,):
        raise UserError(
            f"{name}.crow_indices must have {num_rows + 1} values, one more than the rows; "
            f"got {crow.size}"
        )
    if col.shape != (num_values,) or crow[-1] != num_values:
        raise UserError(
            f"{name} lists {num_values} values, {col.size} columns and ends its rows at "
            f"{crow[-1]}; these must be equal"
        )
    # The bounds come first: differences of numbers inside them cannot wrap.
    is_inside = crow[0] == 0 and crow.min() >= 0 and crow.max() <= num_values
    if not is_inside or (np.diff(crow) < 0).any():
        raise UserError(
            f"{name}.crow_indices must begin at 0, never fall and end at {num_values}; "
            f"got {_shorten(crow)}"
        )
    if col.size and (col.min() < 0 or col.max() >= num_columns):
        raise UserError(f"{name}.col_indices reach outside 0..{num_columns - 1}")
    cells = np.repeat(np.arange(num_rows) * num_columns, np.diff(crow)) + col
    if not (np.diff(cells) > 0).all() and np.unique(cells).size < num_values:
        raise UserError(f"{name}.col_indices name a column of one row twice; name each once")


def to_dense(rows: SparseRows, name: str) -> np.ndarray:
    """Return the full matrix [N, K]; cells that are not listed are 0.

    Raises:
        UserError: as for `check_csr`.
    """
    check_csr(rows, name)
    counts = np.diff(rows.crow_indices)
    dense = np.zeros(rows.shape, rows.values.dtype)
    dense[np.repeat(np.arange(rows.shape[0]), counts), rows.col_indices] = rows.values
    return dense


def _shorten(values: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in values[:8])
    return f"[{shown}{', ...' if values.size > 8 else ''}]"
