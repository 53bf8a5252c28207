"""A difference as plain text for people: what changed first, long lists cut with a count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qkpatch.checkpoint.header import TensorRef
from qkpatch.common.number_ranges import some
from qkpatch.common.text import cut, wrapped
from qkpatch.compare.diff_types import Difference, FileDifference, Files, TensorDifference, Uncompared
from qkpatch.errors import plain

if TYPE_CHECKING:
    from qkpatch.compare.values import Bucket, Change, Values

_MOST = 20  # lines of a list
_COLUMNS = ("dtype", "elements differ", "max |Δ|", "‖Δ‖", "‖Δ‖/‖A‖", "median ULP", "max ULP")
_CUT = "and {} more; --json lists all"


def text(result: Difference, a: str, b: str, width: int) -> str:
    """The difference between the checkpoints that the user calls ``a`` and ``b``, for ``width`` columns."""
    lines = [f"A  {a}", f"B  {b}", _summary(result)]
    renamed = [f"{r.a} is {r.b} in B: {r.tensors} tensor(s)" for r in result.renamed]
    lines += _section("Compared under A's names", renamed)
    if result.changed:
        lines += ["", "Changed", *_table(result.changed, width), *_histograms(result.changed)]
    metadata = [f"{m.key}: {_values(m.a)}, {_values(m.b)} in B" for m in result.metadata]
    sections: dict[str, Sequence[str]] = {
        "Of another dtype or shape": [_retyped(d) for d in result.retyped],
        "Only in A": [_stored(ref) for ref in result.only_in_a],
        "Only in B": [_stored(ref) for ref in result.only_in_b],
        "__metadata__": metadata,
    }
    if (files := result.files) is not None:
        sections |= {
            "Files changed": [_file(file) for file in files.changed],
            "Files only in A": files.only_in_a,
            "Files only in B": files.only_in_b,
        }
    for title, items in sections.items():
        lines += _section(title, items)
    lines += ["", *_remarks(result)]
    return "\n".join(wrapped(line, width) for line in lines).rstrip() + "\n"


def _summary(result: Difference) -> str:
    files, retyped = result.files, (len(result.retyped), "of another dtype or shape")
    facts = [_counted(result.equal_tensors, "tensor(s)", result, retyped)]
    facts += [] if files is None else [_counted(files.equal, "other file(s)", files)]
    return f"{'Equal' if result.equal else 'Different'}: {'; '.join(facts)}"


def _counted(equal: int, what: str, found: Difference | Files, *also: tuple[int, str]) -> str:
    only = (len(found.only_in_a), "only in A"), (len(found.only_in_b), "only in B")
    told = _told((len(found.changed), "changed"), *also, *only)
    return ", ".join(filter(None, (f"{equal} {what} equal", told)))


def _table(changed: Sequence[TensorDifference], width: int) -> list[str]:
    """One line for a tensor, or two where its name leaves no room."""
    shown = changed[:_MOST]
    rows = [(plain(d.name), _cells(d)) for d in shown]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *(cells for _, cells in rows), strict=True)]
    names = max(len(name) for name, _ in rows)
    is_wide = 2 + names + sum(widths) + 2 * len(widths) <= width
    lines = [("  " + "tensor".ljust(names) if is_wide else "  ") + _row(_COLUMNS, widths)]
    for (name, cells), d in zip(rows, shown, strict=True):
        if is_wide:
            lines.append("  " + name.ljust(names) + _row(cells, widths))
        else:
            lines += [f"  {name}", "  " + _row(cells, widths)]
        note = _specials(d.change)
        lines += [f"      {note}"] if note else []
    return lines + _rest(len(changed))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join("  " + cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _cells(d: TensorDifference) -> tuple[str, ...]:
    change = d.change
    assert change is not None  # what is listed as changed
    if change.elements is None:
        differ = f"{change.n_bytes} B {_share(change.n_bytes or 0, d.a.nbytes)}"
    else:
        differ = f"{change.elements} {_share(change.elements, d.elements)}"
    if change.values is None:
        return (d.a.dtype, differ, *"-----")
    values = change.values
    return (
        d.a.dtype,
        differ,
        f"{values.max_abs:.3g}",
        f"{values.frobenius:.3g}",
        _relative(values),
        "-" if values.median_bucket is None else _range(values.median_bucket),
        f"{values.max_ulps:.3g}" if values.max_ulps >= 10**7 else f"{values.max_ulps}",
    )


def _relative(values: Values) -> str:
    return "-" if values.relative is None else f"{values.relative:.4g}"


def _share(n: int, whole: int) -> str:
    """A percentage that says 100 and 0 only where it is all or nothing."""
    percent = 100 * n / whole if whole else 0.0
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if percent < 100 else "100%"


def _specials(change: Change | None) -> str:
    """What the figures leave out."""
    if change is None or change.values is None:
        return ""
    values = change.values
    told = _told(
        (values.zero_signs, "±0 (equal in value)"),
        (values.infinite, "infinite"),
        (values.nan_only_in_a, "NaN only in A"),
        (values.nan_only_in_b, "NaN only in B"),
        (values.nan_payloads, "NaN with other bits"),
    )
    return f"of them {told}" if told else ""


def _told(*counts: tuple[int, str]) -> str:
    return ", ".join(f"{n} {what}" for n, what in counts if n)


def _histograms(changed: Iterable[TensorDifference]) -> list[str]:
    """All changed tensors of a dtype together."""
    found: dict[str, list[Bucket]] = {}
    for d in changed:
        values = None if d.change is None else d.change.values
        if values is not None and values.differing:
            found.setdefault(d.a.dtype, []).extend(values.buckets or ())
    lines = []
    for dtype, buckets in found.items():
        total = sum(bucket.count for bucket in buckets)
        counts: dict[str, int] = {}
        for bucket in sorted(buckets, key=lambda bucket: bucket.first):
            counts[_range(bucket)] = counts.get(_range(bucket), 0) + bucket.count
        shares = [f"{ulps}: {_share(n, total)}" for ulps, n in counts.items() if n >= total / 1000]
        few = ["others <0.1% each"] if len(shares) < len(counts) else []
        lines.append(f"  {dtype} moved by ULPs  {', '.join(shares + few)}")
    return lines


def _range(bucket: Bucket) -> str:
    if bucket.last is None:
        return f">{bucket.first - 1}"
    return f"{bucket.first}" if bucket.first == bucket.last else f"{bucket.first}-{bucket.last}"


def _retyped(d: TensorDifference) -> str:
    kinds = f"{d.name}: {d.a.dtype} {list(d.a.shape)}, {d.b.dtype} {list(d.b.shape)} in B"
    if d.change is None or d.change.values is None:
        return f"{kinds}; values not compared"
    if d.change.elements == 0:
        return f"{kinds}; equal in value"
    values = d.change.values
    figures = f"{values.differing} values differ, max |Δ| {values.max_abs:.3g}, ‖Δ‖/‖A‖ {_relative(values)}"
    return "; ".join(filter(None, (kinds, figures, _specials(d.change))))


def _stored(ref: TensorRef) -> str:
    return f"{ref.name}: {ref.dtype} {list(ref.shape)}"


def _values(values: Sequence[str | None]) -> str:
    return " or ".join("none" if value is None else repr(cut(value, 60)) for value in values) or "none"


def _file(f: FileDifference) -> str:
    size_b = "as many" if f.size_a == f.size_b else f.size_b
    return f"{f.name}: {f.size_a} bytes, {size_b} in B, first at byte {f.first}"


def _section(title: str, items: Sequence[str]) -> list[str]:
    if not items:
        return []
    return ["", title, *(f"  {item}" for item in items[:_MOST]), *_rest(len(items))]


def _rest(n: int) -> list[str]:
    return [f"  {_CUT.format(n - _MOST)}"] if n > _MOST else []


def _remarks(result: Difference) -> list[str]:
    layout = result.layout
    lines = []
    if not layout.equal:
        lines.append(f"The tensors lie otherwise in {layout.shards_a} file(s), {layout.shards_b} in B.")
    if layout.rewritten:
        lines.append(f"Headers that say the same in other words: {some(layout.rewritten)}")
    if result.files is None:
        lines.append("Other files were not compared: a side is a single file.")
    if result.uncompared:
        lines.append(f"Not compared: {', '.join(map(_uncompared, result.uncompared))}")
    return lines


def _uncompared(one: Uncompared) -> str:
    where = "" if one.in_a and one.in_b else " in A" if one.in_a else " in B"
    return f"{one.name}{where} ({one.why})"
