"""The page's chart: seconds against bytes, for a copy, an edit and the load/edit/save loop."""

from __future__ import annotations

from collections.abc import Sequence

from .contest import APPLY, COPY, LOOP
from .report import REFLINK, Row
from .shapes import ALL

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 360, 56, 170, 44, 46
COLOURS = {COPY.name: "#8a8f98", APPLY.name: "#c1272d", LOOP.name: "#3b6ea5"}
DASHES = {"cold": "", "warm": ' stroke-dasharray="6 4"', "memory": ' stroke-dasharray="2 3"'}
Point = tuple[float, float]  # gigabytes, seconds


def draw(table: Sequence[Row]) -> str:
    """The chart as SVG: a line for each contestant and state of the page cache, through its shapes."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for row in table:
        if row.contestant in COLOURS and row.place not in REFLINK and not ALL[row.shape].is_sparse:
            point = ALL[row.shape].n_bytes / 1e9, row.wall
            lines.setdefault((row.contestant, row.cache), []).append(point)
    points = [point for some in lines.values() for point in some] or [(1.0, 1.0)]
    x_step, x_top = _scale(max(x for x, _ in points))
    y_step, y_top = _scale(max(y for _, y in points))

    def at(point: Point) -> Point:
        x = LEFT + point[0] / x_top * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - point[1] / y_top * (HEIGHT - BOTTOM - TOP)

    drawn = [_text(LEFT, 24, "Wall time of a whole process against the bytes of the checkpoint")]
    for mark in range(round(x_top / x_step) + 1):
        x, y = at((mark * x_step, 0))
        drawn.append(_text(x, y + 18, f"{mark * x_step:g} GB", "middle"))
    for mark in range(round(y_top / y_step) + 1):
        x, y = at((0, mark * y_step))
        drawn.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        drawn.append(_text(x - 8, y + 4, f"{mark * y_step:g} s", "end"))
    for i, ((name, cache), some) in enumerate(lines.items()):
        places = [at(point) for point in sorted(some)]
        colour, dash = COLOURS[name], DASHES[cache]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        x, y = WIDTH - RIGHT + 12, TOP + 12 + 20 * i
        drawn.append(f'<path d="M{x} {y - 4}h24" stroke="{colour}" stroke-width="2"{dash}/>')
        drawn.append(_text(x + 30, y, f"{name.split(' + ')[0].replace('load/edit/save ', '')}, {cache}"))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13" fill="#333333">',
        '<rect width="100%" height="100%" fill="white"/>',
        *drawn,
        "</svg>",
    ]) + "\n"  # fmt: skip


def _scale(largest: float) -> tuple[float, float]:
    """A round step, and the first of its multiples that is not below ``largest``: at most six of them."""
    step = next(s * 10.0**e for e in range(-3, 9) for s in (1, 2, 5) if s * 10.0**e * 6 >= largest)
    return step, step * -(-largest // step)


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
