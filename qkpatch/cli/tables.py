"""What people read of a plan, an edit and a verification: headings and tables, plain when piped."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.measure import measure_renderables
from rich.table import Table

from qkpatch.cli.console import lines, markdown_results, results, safe
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.text import LONGEST, about, as_word, cut, size_text, verify_command
from qkpatch.errors import plain
from qkpatch.planning.costs import COPIED, Costs

if TYPE_CHECKING:
    from qkpatch.common.part import Part
    from qkpatch.compare.verify import Verification
    from qkpatch.evaluation.bench import Evaluation
    from qkpatch.model.model import Model
    from qkpatch.patches.in_place import Foreseen
    from qkpatch.planning.manifest import Manifest
    from qkpatch.planning.plan import EditPlan
    from qkpatch.publishing.commit_plan import Publication
    from qkpatch.sweeps.collect import Collected
    from qkpatch.sweeps.record import Sweep


def show_plan(plan: EditPlan, costs: Costs, in_place: Foreseen | None, *, is_markdown: bool) -> None:
    """Print a plan: what is edited, where, and what it costs; as a block of Markdown, with warnings in it."""
    title = f"qkpatch plan {plan.model.source.name}"
    with markdown_results(title) if is_markdown else results() as console:
        for warning in plan.warnings if is_markdown else ():
            console.print(f"Warning: {safe(warning)}")
        _heading(console, plan)
        _costs(console, plan, costs)
        if plan.edits:
            # A row for each shard, or pair of shards: it is a column of names that takes the room.
            rows: dict[tuple[str, str, str], list[int]] = {}
            for edit in plan.edits:
                query, key = plan.output.place(edit.query), plan.output.place(edit.key)
                other = "" if key.shard == query.shard else key.shard
                rows.setdefault((edit.attention, query.shard, other), []).append(edit.layer)
            has_sets, has_others = len(plan.model.sets) > 1, any(other for *_, other in rows)
            sets, others = ["attention"] * has_sets, ["key's shard"] * has_others
            table = plain_table("layers", *sets, "shard", *others)
            for (attention, shard, other), layers in rows.items():
                cells = [attention] * has_sets + [safe(shard)] + [safe(other)] * has_others
                table.add_row(format_ranges(sorted(layers)), *cells)
            print_table(console, table)
        dtypes = " and ".join(sorted({edit.query.dtype for edit in plan.edits})) or "no dtype"
        n_files = len(plan.output.files)
        console.print(
            f"{len(plan.edits)} tensor(s) in {dtypes}, {len(plan.edits) * len(plan.settings.heads)} head(s), "
            f"{size_text(plan.edited_bytes)} rewritten in {len(plan.edits_by_file)} of {n_files} file(s)"
        )
        if in_place is not None:
            where = f"What leads back, by `qkpatch revert`: {safe(str(in_place.undo))}"
            console.print(f"{where}, {size_text(in_place.undo_bytes)}", soft_wrap=True)
        if plan.is_done:
            what = "OUT" if in_place is None else "SOURCE"
            console.print(f"{what} is that already, as its manifest records: nothing would be written")


def _costs(console: Console, plan: EditPlan, costs: Costs) -> None:
    """Disk, memory and time."""
    free = "unknown" if costs.free_disk_bytes is None else size_text(costs.free_disk_bytes)
    kept = costs.undo_bytes if costs.output_bytes is None else costs.output_bytes
    disk = f"{'Undo file' if costs.output_bytes is None else 'OUT'} {size_text(kept or 0)}, free disk {free}"
    memory = f"expected peak memory {size_text(costs.expected_peak_memory_bytes)} ({costs.threads} thread(s))"
    console.print(f"{disk}, {memory}")
    if costs.estimated_seconds is not None and not plan.is_done:
        heads = f" and a core edits {costs.heads_a_second:.0f} heads/s" if costs.heads_a_second else ""
        rate = f"where a disk copies {COPIED / 1e9:g} GB/s{heads}"
        download = "" if plan.model.source.path else ", and as long as the download takes"
        console.print(f"About {about(costs.estimated_seconds)}, {rate}{download}")


def show_applied(plan: EditPlan, manifest: Manifest, out: Path | str) -> None:
    """Print what was done, layer by layer, and how to prove it."""
    n_of, run = Counter(file.action for file in manifest.files), manifest.run
    anew = f", {n_of['resharded']} written anew" if n_of["resharded"] else ""
    what = "Already done, as its manifest records; nothing was written to" if run.already_done else "Wrote"
    resumed = (run.copied_by or {}).get("resumed")
    taken_over = f"; {resumed} of these files taken over from the run before" if resumed else ""
    command = verify_command(str(out), plan.model.source.text, plan.model.recipe_file)
    edited = f"{len(manifest.edits)} tensor(s) edited in {n_of['patched']} file(s)"
    copied = f"{n_of['copied']} file(s) copied{anew}, {size_text(plan.output_bytes)}{taken_over}"
    show_edits(plan, manifest, f"{what} {out}: {edited}, {copied}", f"Prove it with: {command}")


def show_edits(plan: EditPlan, manifest: Manifest, *said: str) -> None:
    """Print figures layer by layer, and what there is to say."""
    with results() as console:
        _heading(console, plan)
        table = plain_table("layer", "heads", "‖ΔW_Q‖/‖W_Q‖ mean", "max", "‖M‖ after/before", "gap min")
        by_energy = any(rule.energy is not None for _, rule in plan.settings.edits)
        if by_energy:
            table.add_column("modes", justify="right")
        has_shares = any(head.realised_share is not None for edit in manifest.edits for head in edit.heads)
        if has_shares:
            table.add_column("realised", justify="right")
        is_coarse = any(edit.scale_tensor is not None for edit in manifest.edits)
        if is_coarse:
            table.add_column("requantisation", justify="right")
        for edit in manifest.edits:
            changes = [head.relative_change for head in edit.heads]
            gaps = [head.gap for head in edit.heads if head.gap is not None]
            shares = [head.realised_share for head in edit.heads if head.realised_share is not None]
            counts = {plan.settings.rule_of(edit.layer).count(h.values_before) for h in edit.heads}
            norms = [h.frobenius_after / h.frobenius_before for h in edit.heads if h.frobenius_before]
            table.add_row(
                str(edit.layer),
                str(len(edit.heads)),
                f"{mean(changes):.4f}",
                f"{max(changes):.4f}",
                f"{mean(norms):.4f}" if norms else "-",
                _least(gaps),
                *([format_ranges(sorted(counts))] if by_energy else []),
                *([f"{mean(shares):.3f}" if shares else "-"] if has_shares else []),
                *([f"{mean(head.rounding_error for head in edit.heads):.3f}"] if is_coarse else []),
            )
        if manifest.edits:
            print_table(console, table)
            told = "‖M‖: of W_Qᵀ W_K, means over heads. Gap: how much smaller the mode beyond the cut is."
            console.print(f"{told} {_REALISED}" if has_shares else told, style="dim")
        for line in said:
            console.print(plain(line), soft_wrap=line == said[-1], markup=False)


def _heading(console: Console, plan: EditPlan) -> None:
    settings = plan.settings
    show_model(console, plan.model)
    chosen = f" (recipe's default: {', '.join(settings.from_recipe)})" if settings.from_recipe else ""
    heads = format_ranges(settings.heads)
    if len(settings.edits) == 1:
        ((layers, rule),) = settings.edits
        console.print(f"Edit: {plan.action(rule)}; layers {format_ranges(layers)}, heads {heads}{chosen}")
        return
    console.print(f"Edit, by layer; heads {heads}{chosen}")
    for layers, rule in settings.edits:
        console.print(f"  {format_ranges(layers)}: {plan.action(rule)}")


def model_line(model: Model) -> str:
    """What a model is, in a line."""
    layout = model.tower.layout
    own = f" ({model.recipe_file})" if model.recipe_file else ""
    return (
        f"{model.source.name}: recipe {model.recipe.name}{own}, {model.tower.n_layers} layers, "
        f"{layout.n_heads} query / {layout.n_kv_heads} key heads of {layout.d_head}, hidden {layout.d_model}"
    )


def show_model(console: Console, model: Model) -> None:
    """Print what a model is, and the names of the tensors that are looked at."""
    layout = model.tower.layout
    console.print(safe(model_line(model)))
    for other in sorted(set(model.tower.exceptions.values()) - {layout}, key=lambda other: other.d_head):
        where = format_ranges([n for n, layout in model.tower.exceptions.items() if layout == other])
        heads = f"{other.n_heads} / {other.n_kv_heads} heads of {other.d_head}"
        console.print(f"Layers {where}: {heads}", soft_wrap=True)
    for one in model.sets:
        names = one.names
        which = f" ({names.attention})" if model.recipe.others else ""
        pair = f"{safe(one.prefix + names.query)} by {safe(names.key)}"
        console.print(f"Tensors{which}: {pair}", soft_wrap=True)


_REALISED = "Realised: share of ‖ΔM‖² that is left with keys that stay."


def show_sweep(sweep: Sweep, out: Path) -> None:
    """Print the figures of all variants, and what evaluates them."""
    table = plain_table("variant", "‖ΔW_Q‖/‖W_Q‖", "energy removed", "realised", "rounding noise")
    for variant in sweep.variants:
        if (of := variant.figures) is not None:
            figures = (of.relative_change, of.energy_removed, of.realised_share, of.rounding_error)
            table.add_row(variant.name, *("-" if figure is None else f"{figure:.4f}" for figure in figures))
    with results() as console:
        print_table(console, table)
        console.print(f"Energy: share of ‖M‖². {_REALISED} Rounding noise: beside ‖ΔW_Q‖.", style="dim")
        script = safe(shlex.join(["bash", as_word(str(out / "evaluate.sh"))]))
        done = "variant(s), all done already" if sweep.already_done else "variant(s)"
        console.print(f"{len(sweep.variants)} {done}; evaluate them with: {script}", soft_wrap=True)


def show_part(part: Part, out: Path) -> None:
    """Print what is done of a sweep or an evaluation, and what is left to do."""
    with results() as console:
        said = f"Part {part} of {out} is done. When all are: the same command without --part"
        console.print(safe(said), soft_wrap=True)


def show_publication(publication: Publication) -> None:
    """Print a commit, file by file, and how much of it is sent."""
    repository, base = publication.repository, publication.base
    kind = "Pull request to" if repository.create_pr else "Commit to"
    private = " (private)" if repository.private else ""
    with results() as console:
        where = f"[bold]{safe(repository.name)}[/]{private}"
        console.print(f"{kind} {where}: {safe(publication.summary)}", soft_wrap=True)
        table = plain_table("action", "size", "file")
        for step in publication.steps:
            how = f"copy from {base.repo}@{base.commit[:12]}" if step.is_copy and base else "upload"
            table.add_row(safe(how), size_text(step.size), safe(step.name))
        print_table(console, table)
        copied = sum(step.size for step in publication.steps if step.is_copy)
        both = f"{size_text(publication.sent_bytes)} to upload, {size_text(copied)} copied"
        console.print(f"{both} on the Hub's side")


def show_verification(result: Verification, out: Path | str) -> None:
    """Print every mismatch and note, then the verdict."""
    with results() as console:
        wrong = [f"{cut(mismatch.where, LONGEST // 2)}: {mismatch.what}" for mismatch in result.mismatches]
        for line in (*lines("[red]mismatch[/]", wrong), *lines("[yellow]note[/]", result.notes)):
            console.print(line, soft_wrap=True)
        if result.ok:
            console.print(
                f"[green]ok[/] {safe(str(out))}: {result.files} files, {size_text(result.compared_bytes)} compared; "
                f"{result.edited_tensors} edited tensors as recorded, every byte outside their planned rows equal"
            )
            console.print(_arithmetic(result), soft_wrap=True)
        else:
            console.print(f"[red]{len(result.mismatches)} mismatch(es)[/] in {safe(str(out))}")


_STACKS = {
    "same": "",
    "other": ", on another stack than made OUT",
    "unknown": ", of which OUT names no stack",
}


def _arithmetic(result: Verification) -> str:
    done = result.arithmetic
    if done is None:
        return "the edit was not computed anew" + ("" if result.edited_tensors else ": there is none")
    said = f"{done.heads} heads computed anew{_STACKS[done.stack]}: "
    if not done.differing_values:
        return said + "every bit the same"
    return said + f"{done.differing_values} number(s) differ by what another stack may make of them"


def _least(gaps: Sequence[float]) -> str:
    return f"{min(gaps):.2g}" if gaps else "-"


def show_evaluation(result: Evaluation) -> None:
    """Print the figures of one model, or of each pair with what chance and stopping earlier could do."""
    with results() as console:
        console.print(f"{len(result.task.pictures.present)} pictures")
        if not result.comparisons:
            table = plain_table("figure", "value")
            for name, value in result.to_json()["sides"][0]["figures"].items():
                table.add_row(name, f"{value:.4f}")
            print_table(console, table)
        for one in result.comparisons:
            model, base = (safe(result.sides[i].label) for i in (one.model, one.base))
            console.print(f"[bold]{model}[/] against [bold]{base}[/]", soft_wrap=True)
            table = plain_table("figure", "base", "model", "difference", "95 % interval", "p", "detectable")
            for name, figure in one.figures.items():
                d = figure.difference
                cells = (figure.base, figure.model), (d.p, figure.smallest_detectable)
                left, right = ([f"{x:.4f}" for x in some] for some in cells)
                table.add_row(name, *left, f"{d.estimate:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}", *right)
            print_table(console, table)
            tests = (f"{name} {t.only_base} : {t.only_model}, p {t.p:.4f}" for name, t in one.mcnemar.items())
            console.print(f"McNemar, base alone : model alone: {'; '.join(tests)}")
            kept = (f"{name} {value:.4f}" for name, value in one.kept.items())
            console.print(f"Kept: {', '.join(kept)}", soft_wrap=True)
        for line in result.verdict:
            console.print(line, soft_wrap=True)


def show_collected(collected: Collected) -> None:
    """Print, by task and figure, every variant against the one that all are held against."""
    with results() as console:
        for task in dict.fromkeys(one.task for one in collected.found):
            mine = [one for one in collected.found if one.task == task]
            for name in dict.fromkeys(name for one in mine for name in one.figures):
                what = f"{safe(name)}, less that of {safe(collected.against)}, n = {mine[0].n}"
                console.print(f"[bold]{safe(task)}[/]: {what}")
                table = plain_table(
                    "variant", "figure", "difference", "95 % interval", "detectable", "p (Holm)", "McNemar"
                )
                for one in (one for one in mine if name in one.figures):
                    figure, test = one.figures[name], one.mcnemar.get(name)
                    d = figure.difference
                    cells = f"{figure.model:.4f}", f"{d.estimate:+.4f}", f"{d.low:+.4f} to {d.high:+.4f}"
                    beyond = f"{figure.smallest_detectable:.4f}", f"{one.holm[name]:.4f}"
                    sides = "-" if test is None else f"{test.only_base} : {test.only_model}, p {test.p:.4f}"
                    table.add_row(safe(one.variant), *cells, *beyond, sides)
                print_table(console, table)


def print_table(console: Console, table: Table) -> None:
    """Print a table, no word or number in it broken: in less room closer together, then with headings of more lines.

    Wider than the terminal where names or numbers would else be broken, which could not be copied.
    """
    room, options = console.width, console.options.update_width(1 << 16)
    sizes = [
        measure_renderables(console, options, [column.header, *column.cells]) for column in table.columns
    ]
    least = [size[column.no_wrap] for column, size in zip(table.columns, sizes, strict=True)]

    def widths(widest: int) -> list[int]:
        return [max(low, min(size.maximum, widest)) for low, size in zip(least, sizes, strict=True)]

    gaps = len(least) - 1
    padding = int(2 + 3 * gaps + sum(least) <= room)
    frame = 2 + (1 + 2 * padding) * gaps
    widest = next((w for w in range(max(map(max, sizes)), 0, -1) if frame + sum(widths(w)) <= room), 0)
    for column, width in zip(table.columns, widths(widest), strict=True):
        column.width = width
    table.padding = (0, padding)
    console.width = max(room, frame + sum(least))
    console.print(table, crop=False)
    console.width = room


def plain_table(*columns: str) -> Table:
    """Plain columns, no frame: fits 80 characters, survives copying; numbers to the right, names whole."""
    # Its line is spelled out where need be; rich would draw a frame of bars, which names and norms have as well.
    table = Table(box=box.Box(str(box.SIMPLE_HEAD), ascii=True), pad_edge=False)
    for column in columns:
        is_text = column.startswith(("shard", "key", "attention", "action", "file", "figure", "variant"))
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    return table
