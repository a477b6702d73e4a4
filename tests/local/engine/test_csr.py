"""CSR matrices: what is sound becomes dense, what is not is refused before an index is used."""

import numpy as np
import pytest

from tinker_cookbook.local.engine.csr import MAX_CELLS, MAX_COLUMNS, check_csr, to_dense
from tinker_cookbook.local.engine.types import SparseRows
from tinker_cookbook.local.errors import UserError

LOW, HIGH = -(2**63), 2**63 - 1


def rows(crow, col, shape=(4, 3), num_values: int | None = None) -> SparseRows:
    values = np.arange(1, 1 + (len(col) if num_values is None else num_values))
    return SparseRows(values, np.array(crow, np.int64), np.array(col, np.int64), shape)


def test_a_matrix_in_full() -> None:
    dense = to_dense(rows([0, 2, 2, 3, 3], [0, 2, 1]), "x")
    np.testing.assert_array_equal(dense, [[1, 0, 2], [0, 0, 0], [0, 3, 0], [0, 0, 0]])
    assert to_dense(rows([0, 0], [], (1, 3)), "x").tolist() == [[0, 0, 0]]
    check_csr(rows([0], [], (0, 5)), "x")
    unsorted = to_dense(rows([0, 3, 4, 4, 4], [2, 0, 1, 2]), "x")
    np.testing.assert_array_equal(unsorted, [[2, 3, 1], [0, 0, 4], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    "matrix",
    [
        # differences of these wrap around to something that looks like rising bounds
        rows([0, HIGH, LOW, -1, 5], [0] * 5),
        rows([0, HIGH, LOW, 5, 5], [0] * 5),
        rows([0, LOW, HIGH, 5, 5], [0] * 5),
        rows([0, 6, 5, 5, 5], [0] * 5),
        rows([0, 3, 2, 4, 5], [0] * 5),
        rows([1, 2, 3, 4, 5], [0] * 5),
        rows([0, 1, 2, 3], [0] * 3),
        rows([0, 1, 2, 3, 4, 5], [0] * 5),
        rows([], []),
        rows([0, 1, 2, 3, 4], [0] * 5),
        rows([0, 1, 2, 3, 5], [0] * 4, num_values=5),
        rows([0, 1, 2, 3, 5], [0] * 5, num_values=4),
        rows([0, 1, 2, 3, 4], [0, 1, 2, 3]),
        rows([0, 1, 2, 3, 4], [0, 1, 2, LOW]),
        rows([0, 1, 2, 3, 4], [0, 1, 2, HIGH]),
        rows([0, 0, 0, 0, 1], [0], (4, 0)),
        rows([0] * 5, [], (4, MAX_COLUMNS + 1)),
        rows([0] * (MAX_CELLS // MAX_COLUMNS + 2), [], (MAX_CELLS // MAX_COLUMNS + 1, MAX_COLUMNS)),
        rows([0, 2, 2, 2, 2], [1, 1]),
        rows([0, 0, 3, 3, 4], [2, 0, 2, 2]),
        rows([], [], (-1, 3)),
        rows([0] * 5, [], (4, -1)),
    ],
)
def test_anything_else_is_refused_by_name(matrix: SparseRows) -> None:
    for use in (check_csr, to_dense):
        with pytest.raises(UserError, match=r"^the matrix"):
            use(matrix, "the matrix")
