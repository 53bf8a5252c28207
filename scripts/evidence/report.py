"""The report: what was found, in Markdown, JSON and three figures; whatever came out is printed."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.evaluation.statistics import Interval
from scripts.evidence import language, toy
from scripts.evidence.edits import thirds
from scripts.evidence.findings import Findings
from scripts.evidence.plots import Point, effect_by_change, trade_off
from scripts.evidence.prose import language_rows, prose_of_language
from scripts.markdown import joined, table
from scripts.toy_vlm.scenes import ABILITIES

Timing = dict[str, float]
RESIZED = "antisymmetric, resized"


def write_report(
    findings: Findings,
    reader: language.Reader | None,
    language_budget: language.Budget,
    out: Path,
    timing: Timing,
) -> list[str]:
    """Write ``report.md``, ``report.json`` and the figures to ``out``; how its conclusions differ from those there."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "report.json"
    before = json.loads(file.read_text("utf-8")) if file.exists() else None
    primary, secondary = findings.primary(), findings.secondary()
    document: dict[str, Any] = {
        "budget": {"toy": asdict(findings.budget), "language": asdict(language_budget)},
        "stack": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "cpu_seconds": timing,
        "settings": {name: edit.key for name, edit in findings.chosen.items()},
        "base": findings.base(),
        "primary": [
            {**c.to_json(), "holm_p": p} for c, p in zip(primary, findings.adjusted(primary), strict=True)
        ],
        "secondary": [c.to_json() for c in secondary],
        "over_stopping": {
            setting: {kind: asdict(found) for kind, found in kinds.items()}
            for setting, kinds in findings.over_stopping().items()
        },
        "test": findings.test_table(),
        "stop_curve": findings.stop_curve(),
        "validation": findings.validation_table(),
        "smallest_detectable": findings.power(primary),
        "language": None if reader is None else language_rows(reader, language_budget),
    }
    file.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    _figures(document, findings, out)
    (out / "report.md").write_text(markdown(document), "utf-8")
    return [] if before is None else changed(verdicts(before), verdicts(json.loads(file.read_text("utf-8"))))


def verdicts(document: Mapping[str, Any]) -> dict[str, str]:
    """What each comparison says: lower, higher, or, where the interval over everything has zero in it, nothing."""
    rows = {
        f"{row['question']} {row['figure']}, {row['setting']}": row["found"]
        for row in (*document["primary"], *document["secondary"])
    }
    for setting, kinds in document["over_stopping"].items():
        rows |= {f"{kind} over stopping earlier, {setting}": found for kind, found in kinds.items()}
    found = {name: Interval(**row["crossed"]) for name, row in rows.items()}
    return {
        name: ("lower" if i.high < 0 else "higher") if i.excludes_zero else "nothing"
        for name, i in found.items()
    }


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Where two reports do not say the same."""
    names = dict.fromkeys((*before, *after))
    return [f"{n}: {before.get(n)}, now {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _figures(document: Mapping[str, Any], findings: Findings, out: Path) -> None:
    named = thirds(findings.subjects[0].editor.n_layers)
    panels: dict[str, list[Point]] = {}
    for name in findings.budget.ranges:
        panels[f"{name}: layers {format_ranges(named[name])}"] = [
            Point(row["kind"], row["change"], 100 * row["chair_s − base"])
            for row in document["validation"]
            if row["layers"] == list(named[name])
        ]
    effect_by_change(panels, out / "effect.png", ylabel="change of CHAIR_s on validation scenes, points")
    points = {
        kind: [
            (rows[kind]["recall"], rows[kind]["chair_s"])
            for rows in document["test"].values()
            if kind in rows
        ]
        for kind in document["test"][toy.CHOSEN]
    }
    curve = [(row["recall"], row["chair_s"]) for row in document["stop_curve"]]
    trade_off(curve, points, out / "stopping.png")
    if document["language"] is not None:
        rows = document["language"]["rows"]
        middle: list[int] = next((r["layers"] for r in rows), [])
        panel = [Point(r["kind"], r["change"], r["loss"]["estimate"]) for r in rows if r["layers"] == middle]
        title = f"SmolLM2-135M, layers {format_ranges(middle)}"
        effect_by_change({title: panel}, out / "language.png", ylabel="change of loss, nats per token")


def markdown(document: Mapping[str, Any]) -> str:
    """The report for people."""
    budget = document["budget"]["toy"]
    models = document["base"]
    parts = [
        "# Evidence, as measured",
        "Made by `make evidence`; every number is in [report.json](report.json). What is measured and how, and what to run on a "
        "real model: [README.md](README.md).",
        "## The four questions, on a toy",
        f"{len(models)} trained toys, {budget['test_scenes']:,} test scenes each (answers and perplexity: {budget['asked_scenes']}, four questions of each ability), {budget['draws']} draws of random modes and of as many as make the norm equal, {budget['draws_of_others']} of subspaces and of noise. "
        "Δ is dominant or symmetric less the other; *capability kept?* is dominant less no edit. It is in points of the figure (CHAIR_s: percent of captions that name something absent; lower is better; accuracies: higher is "
        "better). Intervals are 95 % bootstrap intervals, once over scenes, models and draws together, once over scenes alone. Holm's correction is over all "
        f"{len(document['primary'])} rows of this table; nothing else in this report is corrected for multiplicity.",
        "Settings: " + "; ".join(f"**{name}** = {key}" for name, key in document["settings"].items()) + ". *Chosen* had the lowest "
        f"CHAIR_s on {budget['validation_scenes']} validation scenes among all dominant settings that lose at most "
        f"{toy.RECALL_ALLOWANCE:.0%} of recall; the others are the candidates for a default, fixed beforehand.",
        table(
            ["question", "setting", "figure", "Δ", "over scenes, models, draws", "over scenes", "by model", "p (Holm)"],
            (_primary_row(row) for row in document["primary"]),
        ),
        "A difference of CHAIR_s that this would have found four times in five, at these models: "
        + ", ".join(f"{value * 100:.1f} points ({name})" for name, value in document["smallest_detectable"].items())
        + ".",
        "## Further comparisons, not corrected",
        f"*{RESIZED}* is scaled to the ‖ΔW_Q‖ of symmetric.",
        table(
            ["compared", "setting", "figure", "Δ", "over scenes, models, draws", "over scenes", "by model"],
            (_secondary_row(row) for row in document["secondary"]),
        ),
        "### Against stopping earlier",
        "A bias on the end-of-caption logit, without any edit, trades recall for CHAIR_s. How far each setting is from that curve at its own "
        "recall (below zero: better than stopping earlier; the curve's end counts beyond its end):",
        table(
            ["setting", "kind", "Δ CHAIR_s", "over scenes, models", "over scenes", "by model"],
            (
                [setting, kind, *_difference(found, 100)]
                for setting, kinds in document["over_stopping"].items()
                for kind, found in kinds.items()
            ),
        ),
        "![CHAIR_s against recall](stopping.png)",
        table(
            ["stop bias", "CHAIR_s", "CHAIR_i", "recall", "objects named"],
            ([f"{row['stop_bias']:g}", *_captions(row)] for row in document["stop_curve"]),
        ),
        "## Effect against size",
        "The figure that matters: all kinds of edit on one axis, by how far they move the weights. Validation scenes, means over models; each point is one setting "
        "(r × α), random kinds with one draw.",
        "![change of CHAIR_s against the size of the edit](effect.png)",
        "## Figures on test scenes",
        "*Size* is ‖ΔW_Q‖ / ‖W_Q‖. Before any edit:",
        table(
            ["model", "CHAIR_s", "CHAIR_i", "recall", "objects", "perplexity", *ABILITIES, "CHAIR_s, wrong picture"],
            (
                [name, *_captions(row), f"{row['perplexity']:.3f}", *(f"{row[a]:.1%}" for a in ABILITIES), f"{row['chair_s wrong picture']:.1%}"]
                for name, row in models.items()
            ),
        ),
    ]  # fmt: skip
    for setting, rows in document["test"].items():
        parts += [
            f"After, *{setting}* ({document['settings'][setting]}), means over models and draws:",
            table(
                [
                    "kind",
                    "size",
                    "CHAIR_s",
                    "CHAIR_i",
                    "recall",
                    "objects named",
                    "perplexity",
                    *ABILITIES,
                ],
                (_test_row(_short(kind), row) for kind, row in rows.items()),
            ),
        ]
    parts += ["## Validation: the best of each kind", *_best(document)]
    if document["language"] is not None:
        parts += prose_of_language(document["language"], document["budget"]["language"])
    minutes = sum(document["cpu_seconds"].values()) / 60
    parts.append(
        f"Measured with torch {document['stack']['torch']}, Python {document['stack']['python']}; {minutes:.0f} minutes of one core."
    )
    return joined(parts)


def _primary_row(row: Mapping[str, Any]) -> list[str]:
    p = f"{row['holm_p']:.4f}" if row["holm_p"] >= 0.0001 else "< 0.0001"
    return [row["question"], row["setting"], row["figure"], *_difference(row["found"], 100), p]


def _secondary_row(row: Mapping[str, Any]) -> list[str]:
    # Perplexity is compared as the loss in nats, length in objects.
    unit = 1 if row["figure"] in ("perplexity", "length") else 100
    figure = "loss, nats" if row["figure"] == "perplexity" else row["figure"]
    compared = f"{row['a']} − {_short(row['b'])}"
    return [compared, row["setting"], figure, *_difference(row["found"], unit)]


def _difference(found: Mapping[str, Any], unit: int) -> list[str]:
    digits = 1 if unit == 100 else 3
    crossed, scenes = (Interval(**found[name]) for name in ("crossed", "scenes_only"))

    def between(i: Interval) -> str:
        return f"{_signed(i.low * unit, digits)} to {_signed(i.high * unit, digits)}"

    by_model = ", ".join(_signed(x * unit, digits) for x in found["by_model"])
    return [f"**{_signed(crossed.estimate * unit, digits)}**", between(crossed), between(scenes), by_model]


def _captions(row: Mapping[str, float]) -> list[str]:
    return [f"{row['chair_s']:.1%}", f"{row['chair_i']:.1%}", f"{row['recall']:.1%}", f"{row['length']:.2f}"]


def _test_row(kind: str, row: Mapping[str, float]) -> list[str]:
    chair_s, *rest = _captions(row)
    if "chair_s lowest draw" in row:
        chair_s += f" ({row['chair_s lowest draw']:.1%} to {row['chair_s highest draw']:.1%})"
    perplexity = f"{row['perplexity']:.3f}" if "perplexity" in row else "–"
    return [kind, f"{row['change']:.3f}", chair_s, *rest, perplexity, *(f"{row[a]:.1%}" if a in row else "–" for a in ABILITIES)]  # fmt: skip


def _best(document: Mapping[str, Any]) -> list[str]:
    """Per kind, the setting that the rule of choice would take."""
    rows: Sequence[Mapping[str, Any]] = document["validation"]
    found = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [r for r in rows if r["kind"] == kind]
        allowed = [r for r in mine if r["recall − base"] >= -toy.RECALL_ALLOWANCE]
        best = min(allowed, key=lambda r: r["chair_s"], default=None)
        if best is not None:
            found.append(
                [kind, f"{len(allowed)} of {len(mine)}", f"layers {format_ranges(best['layers'])}, r {best['modes']}, α {exact(best['alpha'])}",
                 f"{best['change']:.3f}", f"{best['chair_s']:.1%}", _signed(100 * best["chair_s − base"], 1), _signed(100 * best["recall − base"], 1)]
            )  # fmt: skip
        else:
            found.append([kind, f"0 of {len(mine)}", *["–"] * 5])
    return [
        "The lowest CHAIR_s of each kind within the allowance of recall. The best of many is flattered by chance, every kind alike; random kinds have one draw here.",
        table(
            ["kind", "settings within the allowance", "best", "size", "CHAIR_s", "Δ CHAIR_s, points", "Δ recall, points"], found
        ),
    ]  # fmt: skip


def _short(kind: str) -> str:
    return RESIZED if kind == "antisymmetric sized like symmetric" else kind


def _signed(x: float, digits: int) -> str:
    return f"{x:+.{digits}f}".replace("-", "−")
