"""The rules of tic-tac-toe, and the best moves."""

from __future__ import annotations

import functools
import re

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
EMPTY = " " * 9
Board = str
"""Nine characters, row by row: X, O or a space."""


def side_to_move(board: Board) -> str:
    """Return X or O; X starts."""
    return "X" if board.count("X") == board.count("O") else "O"


def free_squares(board: Board) -> list[int]:
    """Return the numbers of the empty squares, from 1 to 9."""
    return [i + 1 for i, mark in enumerate(board) if mark == " "]


def play(board: Board, square: int) -> Board:
    """Return the board after the side to move has taken a free square."""
    assert board[square - 1] == " ", "callers check that the square is free"
    return board[: square - 1] + side_to_move(board) + board[square:]


def winner(board: Board) -> str | None:
    """Return X or O, `draw` for a full board, or None if the game has not ended."""
    for a, b, c in LINES:
        if board[a] != " " and board[a] == board[b] == board[c]:
            return board[a]
    return None if " " in board else "draw"


def show(board: Board) -> str:
    """Return the board as three lines; empty squares show their number."""
    marks = [mark if mark != " " else str(i + 1) for i, mark in enumerate(board)]
    return "\n".join(" ".join(marks[row : row + 3]) for row in (0, 3, 6))


def read_move(text: str, board: Board) -> int | None:
    """Return the free square that a reply names; None if it has no such number, or several."""
    numbers = re.findall(r"\d+", text)
    if len(numbers) != 1 or int(numbers[0]) not in free_squares(board):
        return None
    return int(numbers[0])


@functools.cache
def value(board: Board) -> int:
    """Return the result for the side to move if both play best: 1, 0 or -1 (negamax)."""
    end = winner(board)
    if end is not None:
        return 0 if end == "draw" else -1  # the side that just moved has won
    return max(-value(play(board, square)) for square in free_squares(board))


def best_moves(board: Board) -> list[int]:
    """Return the squares that keep the best possible result."""
    return [s for s in free_squares(board) if -value(play(board, s)) == value(board)]
