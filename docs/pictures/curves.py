"""Draw learning curves of runs as an SVG file: a held-out score against sampled tokens.

    python docs/pictures/curves.py OUTPUT.svg "rewards=/path/to/run" "distilled=/path/to/run" \\
        --line "teacher=0.70"

Reads `metrics.jsonl` of each run. Error bars are one standard error.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 56, 44, 16, 16
COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df")
SCORE = "test/env/all/reward/total"
ERROR = "test/env/all/reward/stderr"
TOKENS = "env/all/total_ac_tokens"
TICKS = 5


@dataclass(frozen=True)
class Point:
    """A held-out score after a number of sampled tokens."""

    tokens: float
    score: float
    error: float


def read_curve(folder: Path) -> list[Point]:
    """Return the evaluations of a run; tokens are those of training, not of evaluation."""
    points, tokens = [], 0.0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if SCORE in row:
            points.append(Point(tokens, row[SCORE], row.get(ERROR, 0.0)))
        tokens += row.get(TOKENS, 0.0)
    return points


def draw(curves: dict[str, list[Point]], lines: dict[str, float]) -> str:
    """Return the picture."""
    most = max(point.tokens for points in curves.values() for point in points)

    def x(tokens: float) -> float:
        return LEFT + tokens / most * (WIDTH - LEFT - RIGHT)

    def y(score: float) -> float:
        return HEIGHT - BOTTOM - score * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for tick in range(TICKS + 1):
        share = tick / TICKS
        parts.append(_line(LEFT, y(share), WIDTH - RIGHT, y(share), "#d0d7de"))
        parts.append(_text(LEFT - 8, y(share) + 4, f"{share:.1f}", "end"))
        parts.append(_text(x(share * most), HEIGHT - BOTTOM + 18, f"{share * most:,.0f}", "middle"))
    parts.append(_text(WIDTH / 2, HEIGHT - 6, "tokens sampled for training", "middle"))
    for name, score in lines.items():
        parts.append(_line(LEFT, y(score), WIDTH - RIGHT, y(score), "#57606a", dashed=True))
        parts.append(_text(WIDTH - RIGHT - 4, y(score) - 5, name, "end"))
    for number, (name, points) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(f"{x(p.tokens):.1f},{y(p.score):.1f}" for p in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for p in points:
            low, high = y(p.score - p.error), y(p.score + p.error)
            parts.append(_line(x(p.tokens), low, x(p.tokens), high, color))
            parts.append(
                f'<circle cx="{x(p.tokens):.1f}" cy="{y(p.score):.1f}" r="3" fill="{color}"/>'
            )
        parts.append(_text(LEFT + 12, TOP + 14 + 16 * number, name, "start", color))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'
    )


def _text(x: float, y: float, text: str, anchor: str, color: str = "#24292f") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'
    )


def main() -> None:
    """Read the runs and write the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--line", action="append", default=[], metavar="NAME=SCORE")
    args = parser.parse_args()
    runs = dict(run.split("=", 1) for run in args.runs)
    lines = {name: float(score) for name, score in (line.split("=", 1) for line in args.line)}
    curves = {name: read_curve(Path(folder)) for name, folder in runs.items()}
    args.output.write_text(draw(curves, lines), encoding="utf-8")
    for name, points in curves.items():
        print(name, *(f"{p.tokens:.0f}:{p.score:.3f}({p.error:.3f})" for p in points))


if __name__ == "__main__":
    main()
