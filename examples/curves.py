"""Curves of a loss over operations, and a plot of them without a plotting library."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _MARGIN = 720, 420, 56


@dataclass
class Curve:
    """Points of (operations, loss), in order of operations."""

    name: str
    points: list[tuple[float, float]] = field(default_factory=list)

    def add(self, x: float, y: float) -> None:
        """Add a point."""
        self.points.append((x, y))

    @property
    def least(self) -> float:
        """The least loss."""
        return min(y for _, y in self.points)

    @property
    def when_least(self) -> float:
        """The operations after which the loss was least."""
        return min(self.points, key=lambda point: point[1])[0]

    def reached(self, y: float, after: float = 0.0) -> float | None:
        """The operations after which the loss was first `y` or less, interpolated between points; None if never.

        Points up to `after` do not count.
        """
        before: tuple[float, float] | None = None
        for point in (each for each in self.points if each[0] > after):
            if point[1] <= y:
                if before is None:
                    return point[0]
                share = (before[1] - y) / (before[1] - point[1])
                return before[0] + share * (point[0] - before[0])
            before = point
        return None


def write_svg(path: Path, curves: Sequence[tuple[Curve, str]], x_label: str, y_label: str) -> None:
    """Write a line plot; each curve comes with its colour. The upper half of the losses' range is cut off."""
    xs = [x for curve, _ in curves for x, _ in curve.points]
    ys = sorted(y for curve, _ in curves for _, y in curve.points)
    low, high = ys[0], ys[max(1, len(ys) * 9 // 10) - 1]
    span, right = max(high - low, 1e-9), max(xs)

    def place(point: tuple[float, float]) -> str:
        x = _MARGIN + point[0] / right * (_WIDTH - 2 * _MARGIN)
        y = _HEIGHT - _MARGIN - (min(point[1], high) - low) / span * (_HEIGHT - 2 * _MARGIN)
        return f"{x:.1f},{y:.1f}"

    lines = [
        f'<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{" ".join(map(place, curve.points))}">'
        f"<title>{escape(curve.name)}</title></polyline>"
        for curve, color in curves
    ]
    ticks = [
        f'<text x="{_MARGIN - 6}" y="{float(place((0, y)).split(",")[1]):.1f}" text-anchor="end">{y:.2f}</text>'
        for y in (low, (low + high) / 2, high)
    ]
    ticks += [
        f'<text x="{float(place((x, low)).split(",")[0]):.1f}" y="{_HEIGHT - _MARGIN + 18}" '
        f'text-anchor="middle">{x:.2g}</text>'
        for x in (0, right / 2, right)
    ]
    labels = (
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="{_MARGIN}" y="24">{escape(y_label)}</text>'
    )
    frame = (
        f'<rect x="{_MARGIN}" y="{_MARGIN}" width="{_WIDTH - 2 * _MARGIN}" height="{_HEIGHT - 2 * _MARGIN}" '
        'fill="none" stroke="#cccccc"/>'
    )
    body = "\n".join([frame, *lines, *ticks, labels])
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n{body}\n</svg>\n',
        encoding="utf-8",
    )
