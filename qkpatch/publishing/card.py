"""The model card of an edited checkpoint: what was edited, what is claimed and by whom, and the base model's card."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from statistics import mean

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.planning.manifest import Manifest
from qkpatch.publishing import front_matter
from qkpatch.publishing.lmms_eval import Comparison, Metric
from qkpatch.recipes.catalogue import shipped_recipes

CARD_NAME = "README.md"
TAG = "qkpatch"
PAPER = "https://arxiv.org/abs/2606.20419"
FOLLOWS = "<!-- The card of the base model follows, as it was. -->"
_MEASURED = "\nMeasured for this model with lmms-eval"
# Figures, addresses and successors of the base model, which are not this one's.
_NOT_INHERITED = ("model-index", "new_version", "eval_results")


def model_card(
    manifest: Manifest,
    title: str,
    base_card: str | None,
    comparison: Comparison | None,
    *,
    is_checked: bool = False,
) -> str:
    """The card as Markdown.

    Args:
        manifest: what was done.
        title: the model's name.
        base_card: SOURCE's README.md, whose text is kept below ours.
        comparison: results of both models.
        is_checked: this very OUT was just verified.
    """
    yaml, text = front_matter.split(base_card or "")
    base = manifest.source.name if manifest.source.kind == "hub" else None
    values: dict[str, str | list[str]] = {}
    if base is not None:
        values |= {"base_model": base, "base_model_relation": "finetune"}
    values["tags"] = list(dict.fromkeys([*front_matter.listed(yaml, "tags"), TAG]))
    parts = [
        f"---\n{front_matter.changed(yaml, values, _NOT_INHERITED)}---\n",
        f"\n# {title}\n",
        *_edit(manifest, base, is_checked=is_checked),
        *_claims(comparison),
    ]
    if base_card is not None:
        parts.append(f"\n{FOLLOWS}\n\n{text}")
    return "".join(parts)


def is_card_of(card: str, manifest: Manifest, base_card: str | None) -> bool:
    """Whether :func:`model_card` made ``card`` of just these, whatever its title and results, to the letter."""
    title = front_matter.split(card)[1].partition("# ")[2].partition("\n")[0]
    nothing = "".join([*_claims(None)][1:])
    for is_checked in (False, True):
        plain = model_card(manifest, title, base_card, None, is_checked=is_checked)
        head, _, tail = plain.partition(nothing)
        if card == plain or (card.startswith(head + _MEASURED) and card.endswith(tail)):
            return True
    return False


def has_results(card: str) -> bool:
    """Whether a card of ours reports measurements of the model."""
    return _MEASURED in card.partition(FOLLOWS)[0]


def is_card_over(card: str, base_card: str | None) -> bool:
    """Whether ``card`` is one of ours, with the whole text of the base model's, where that has one."""
    is_ours = TAG in front_matter.listed(front_matter.split(card)[0], "tags")
    return is_ours and (
        base_card is None or card.endswith(f"{FOLLOWS}\n\n{front_matter.split(base_card)[1]}")
    )


def _edit(manifest: Manifest, base: str | None, *, is_checked: bool) -> Iterator[str]:
    source, edit = manifest.source, manifest.edit
    what = f"[{base}](https://huggingface.co/{base})" if base else f"`{source.name}`"
    commit = f" at commit `{source.commit}`" if source.commit else ""
    yield (
        f"\nThis is {what}{commit}, with the query weights of its language model edited by qkpatch "
        f"{manifest.tool.version}: *QK Product Steering* ([arXiv 2606.20419]({PAPER})), a weight edit alone, "
        "without training and without data. Keys, all other tensors and all other files are the base model's; only "
        "this card is new.\n"
    )
    yield "\n## The edit\n\n| | |\n|---|---|\n"
    rows = {
        "recipe": manifest.recipe.name,
        "layers": format_ranges(edit.layers),
        "query heads": format_ranges(edit.heads),
        "selection": f"{edit.select.value}, {edit.modes_edited} mode(s) per head",
        "factor α": exact(edit.alpha),
        "channel of `W_Qᵀ W_K`": edit.channel.value
        + (", gain before attention folded in" if edit.fold_norm else ""),
        "edited tensors": f"{len(manifest.edits)} in {' and '.join(sorted({e.dtype for e in manifest.edits})) or '-'}",
    }
    yield "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    if any(record.heads for record in manifest.edits):
        yield "\n| layer | tensor | ‖ΔW_Q‖/‖W_Q‖, mean over heads | largest |\n|---|---|---|---|\n"
        for record in manifest.edits:
            changes = [head.relative_change for head in record.heads]
            yield f"| {record.layer} | `{record.tensor}` | {mean(changes):.4f} | {max(changes):.4f} |\n"
    own = "" if manifest.recipe.name in shipped_recipes() else f" --recipe {shlex.quote(_recipe(manifest))}"
    made = (
        "Made, and checked byte for byte, by"
        if is_checked
        else "Made by the first of these; the second checks it"
    )
    yield (
        f"\n`qkpatch.json` records every edited tensor and head, with digests before and after. {made}\n\n"
        f"```\n{_command(manifest)}\nqkpatch verify OUT --source {_source(manifest)}{own}\n```\n"
    )


def _source(manifest: Manifest) -> str:
    return shlex.quote(manifest.source.address or manifest.source.name)


def _recipe(manifest: Manifest) -> str:
    """As the command line names it: one of the user's own lies in a file that is called after it."""
    name = manifest.recipe.name
    return name if name in shipped_recipes() else f"./{name}.yaml"


def _command(manifest: Manifest) -> str:
    request, device = manifest.request(), manifest.compute.device
    flags = {
        "recipe": _recipe(manifest),
        "attention": ",".join(request.attention or ()),
        "layers": format_ranges(request.layers or ()),
        "heads": format_ranges(request.heads or ()),
        "modes": request.modes,
        "alpha": None if request.alpha is None else exact(request.alpha),
        "channel": None if request.channel is None else request.channel.value,
        "select": None if request.select is None else request.select.value,
        "seed": request.seed,
        "max-shard-size": request.max_shard_size,
        "device": None if device == "cpu" else device,
    }
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items() if value is not None]
    fold = ["--fold-norm"] if request.fold_norm else []
    return " ".join(["qkpatch apply", _source(manifest), *given, *fold, "-o OUT"])


def _claims(comparison: Comparison | None) -> Iterator[str]:
    yield (
        "\n## What is claimed\n\nThe paper reports, for its own models and settings, −4.0 % relative CHAIR_s on "
        "average over three vision-language models, with general capability kept. Its exact layers, ranks and "
        "strength are not published, and that is its finding, not a measurement of this model.\n"
    )
    if comparison is None:
        yield (
            "\n**Nothing was measured for this model.** Evaluate it before you use it, beside the base model and "
            "beside the controls `--select shrink` and `--select random`.\n"
        )
        return
    yield (
        f"{_MEASURED}, by whoever made it, both models with the same call. Base: "
        f"`{comparison.base}`; patched: `{comparison.patched}`.\n\n"
        "| task | metric | questions | base | patched | difference | paired, 95 % interval | questions that differ |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    yield "".join(_row(metric) for metric in comparison.metrics)
    if any(metric.paired is not None for metric in comparison.metrics):
        yield "\nPaired: the mean of the differences, question by question, ± 1.96 standard errors.\n"
    else:
        yield "\nThe samples of the runs were not at hand, so there is no interval: small differences may be chance.\n"


def _row(metric: Metric) -> str:
    paired = metric.paired
    interval = "-" if paired is None else f"{paired.mean:+.4f} ± {paired.half_width:.4f}"
    differing = "-" if paired is None else f"{paired.changed} of {paired.n}"
    n = "-" if metric.n is None else str(metric.n)
    return (
        f"| {metric.task} | {metric.name} | {n} | {metric.base:.4f} | {metric.patched:.4f} "
        f"| {metric.difference:+.4f} | {interval} | {differing} |\n"
    )
