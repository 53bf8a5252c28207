"""The model card of an edited checkpoint: what was edited, what is claimed and by whom, and the base model's card."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from statistics import mean

from qkpatch.common.json_text import exact
from qkpatch.common.number_ranges import format_ranges
from qkpatch.common.strict_yaml import yaml_text
from qkpatch.common.text import as_word, cut, verify_command
from qkpatch.common.typed_json import as_json
from qkpatch.errors import plain
from qkpatch.planning.blocks import EditBlock
from qkpatch.planning.manifest import Manifest
from qkpatch.publishing.front_matter import FrontMatter
from qkpatch.publishing.lmms_eval import Comparison, Metric
from qkpatch.recipes.catalogue import shipped_recipes

CARD_NAME = "README.md"
TAG = "qkpatch"
PAPER = "https://arxiv.org/abs/2606.20419"
FOLLOWS = "<!-- The card of the base model follows, as it was. -->"
# Figures, addresses, successors and relations of the base model, which are not this one's; YAML's merge of mappings.
_NOT_INHERITED = ("model-index", "new_version", "eval_results", "base_model_relation", "<<")
# Of the command that makes an edit again.
_FLAGS = (
    "recipe", "prefix", "attention", "config", "layers", "heads", "modes", "min_modes", "energy", "alpha", "channel",
    "select", "seed", "max_shard_size", "device",
)  # fmt: skip
_EDITED = "with the query weights of its language model edited by qkpatch"
CHECKED = "Made, and checked byte for byte, by"
_MEASURED = "\nMeasured for this model with "
_RESULTS = re.compile(
    _MEASURED + r"(?:lmms-eval|qkpatch evaluate), by whoever made it, both .*\n\n(?:\|.*\n)+"
    r"(?:\n(?:Paired: |The samples |\*\*Not the model alone).*\n)+"
)  # fmt: skip


def card_text(raw: bytes) -> str:
    """The text of a README in whichever Unicode, a byte-order mark or not; what is no text in it is replaced."""
    return raw.decode(json.detect_encoding(raw), "replace")


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
        base_card: SOURCE's README.md, whose text is kept below ours; of a card of ours the text below that one.
        comparison: results of both models; of another edit they are a :class:`UsageError`.
        is_checked: this very OUT was just verified.
    """
    if comparison is not None:
        comparison.check_is_of(manifest.edit)
    own = [*_edit(manifest, is_checked=is_checked), *_claims(comparison)]
    tail = _tail(base_card)
    if manifest.adapter is not None:
        tail = f"\n## Loading it\n\n```\n{plain(loading(manifest, title))}\n```\n"
    return "".join([_head(manifest, base_card), f"\n# {_heading(title)}\n", *own, tail])


def loading(manifest: Manifest, out: str, source: str | None = None) -> str:
    """How the adapter ``out`` is loaded: a line of Python, or of a shell."""
    adapter = manifest.adapter
    if adapter is None or adapter.max_lora_rank is None:
        return f"model = peft.PeftModel.from_pretrained(model, {json.dumps(out, ensure_ascii=False)})"
    base = as_word(source or manifest.source.address or manifest.source.name)
    flags = ["--max-lora-rank", str(adapter.max_lora_rank), "--lora-modules", f"qkpatch={out}"]
    serve = shlex.join(["vllm", "serve", base, "--enable-lora", *flags])
    return f"{serve}  # modules are named as in vLLM's sources; vLLM was not run"


def is_card_of(card: str, manifest: Manifest, base_card: str | None) -> bool:
    """Whether :func:`model_card` made ``card`` of just these, whatever its title and results, to the letter."""
    head, tail = f"{_head(manifest, base_card)}\n# ", _tail(base_card)
    title, _, own = card[len(head) : len(card) - len(tail)].partition("\n")
    paper, nothing = _claims(None)
    said = ("".join(_edit(manifest, is_checked=is_checked)) + paper for is_checked in (False, True))
    return card == f"{head}{_heading(title)}\n{own}{tail}" and any(
        own == edit + nothing or (own.startswith(edit) and _RESULTS.fullmatch(own, len(edit)))
        for edit in said
    )


def has_results(card: str) -> bool:
    """Whether a card of ours reports measurements of the model."""
    return _MEASURED in card.partition(FOLLOWS)[0]


def is_ours(card: FrontMatter) -> bool:
    """Whether a card says that it is one of ours."""
    return TAG in card.listed("tags") and _EDITED in card.text.partition(FOLLOWS)[0]


def _head(manifest: Manifest, base_card: str | None) -> str:
    values: dict[str, str | list[str]] = {}
    if manifest.source.kind == "hub":
        relation = "finetune" if manifest.adapter is None else "adapter"
        values |= {"base_model": manifest.source.name, "base_model_relation": relation}
    base, tags = FrontMatter.of(base_card or ""), [TAG]
    if manifest.adapter is not None:
        values["library_name"], tags = "peft", ["lora", TAG]
    values["tags"] = list(dict.fromkeys([*base.listed("tags"), *tags]))
    return f"---\n{base.changed(values, _NOT_INHERITED)}---\n"


def _tail(base_card: str | None) -> str:
    """The base model's text; where its card is one of ours, whose figures are not this one's, the text below."""
    base = FrontMatter.of(base_card or "")
    text = base.text.partition(f"{FOLLOWS}\n\n")[2] if is_ours(base) else base.text
    fault = None if "license" in base.entries else FrontMatter.of(text).fault
    lost = f"\nThe head of the base model's card is {plain(fault or '')}: no license is inherited.\n"
    return f"{lost if fault else ''}\n{FOLLOWS}\n\n{text}" if text else ""


def _edit(manifest: Manifest, *, is_checked: bool) -> Iterator[str]:
    source, edit = manifest.source, manifest.edit
    name = _cell(source.name)
    what = f"[{name}](https://huggingface.co/{name})" if source.kind == "hub" else f"`{name}`"
    commit = f" at commit `{_cell(source.commit)}`" if source.commit else ""
    kept = "Keys, all other tensors and all other files are the base model's; only this card is new."
    if manifest.adapter is not None:
        what = f"a low-rank adapter for {what}"
        kept = "`W_Q + B A` is the edited weight: A and B are the factors of the edit itself, rounded once."
    yield (
        f"\nThis is {what}{commit}, {_EDITED} {_cell(manifest.tool.version)}: *QK Product Steering* "
        f"([arXiv 2606.20419]({PAPER})), a weight edit alone, without training and without data. {kept}\n"
    )
    if (previous := source.previous_edit) is not None:
        yield f"\nThat was edited by qkpatch before: {told(previous)}.\n"
    yield "\n## The edit\n\n| | |\n|---|---|\n"
    rows = {
        "recipe": manifest.recipe.name,
        "layers": format_ranges(edit.layers),
        "query heads": format_ranges(edit.heads),
    }
    folded = ", gain before attention folded in" if edit.fold_norm else ""
    for part in edit.parts:
        where = "" if edit.edits is None else f", layers {format_ranges(part.layers)}"
        rows[f"selection{where}"] = f"{part.select.value}, {part.counted} mode(s) per head"
        rows[f"factor α{where}"] = exact(part.alpha)
        rows[f"channel of `W_Qᵀ W_K`{where}"] = part.channel.value + folded
    dtypes = " and ".join(sorted({e.dtype for e in manifest.edits})) or "-"
    rows["edited tensors"] = f"{len(manifest.edits)} in {dtypes}"
    yield "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items())
    if any(record.heads for record in manifest.edits):
        yield "\n| layer | tensor | ‖ΔW_Q‖/‖W_Q‖, mean over heads | largest |\n|---|---|---|---|\n"
        for record in manifest.edits:
            changes = [head.relative_change for head in record.heads]
            yield f"| {record.layer} | `{_cell(record.tensor)}` | {mean(changes):.4f} | {max(changes):.4f} |\n"
    if edit.edits is not None:
        items = yaml_text({"edits": edit.items})
        yield f"\nWhat differs by layer, as `edit.yaml`:\n\n```yaml\n{items}```\n"
    if (adapter := manifest.adapter) is not None:
        yield (
            f"\nRank {adapter.rank}, scale 1, {adapter.dtype}, modules named for {adapter.runtime}. Made by:\n\n```\n"
            f"{plain(_command(manifest))}\n```\n"
        )
        return
    own = None if manifest.recipe.name in shipped_recipes() else _recipe(manifest)
    proof = verify_command("OUT", manifest.source.address or manifest.source.name, own)
    made = CHECKED if is_checked else "Made by the first of these; the second checks it"
    has_digests = any(written.sha256_after for record in manifest.edits for written in record.written)
    digests = ", with digests before and after" if has_digests else ""
    yield (
        f"\n`qkpatch.json` records every edited tensor and head{digests}. {made}\n\n"
        f"```\n{plain(_command(manifest))}\n{plain(proof)}\n```\n"
    )


def told(edit: EditBlock) -> str:
    """The settings of an edit in one line."""
    return "; ".join(
        f"layers {format_ranges(part.layers)}, {part.chosen} mode(s), alpha {exact(part.alpha)}, "
        f"{part.channel.value} channel"
        for part in edit.parts
    )


def _recipe(manifest: Manifest) -> str:
    """As the command line names it: one of the user's own lies in a file that is called after it."""
    name = manifest.recipe.name
    return name if name in shipped_recipes() else f"./{name}.yaml"


def _command(manifest: Manifest) -> str:
    request, device = manifest.request(), manifest.compute.device
    source = shlex.quote(as_word(manifest.source.address or manifest.source.name))
    said = {k: exact(v) if isinstance(v, float) else v for k, v in as_json(request).items()}
    said |= {key: format_ranges(getattr(request, key) or ()) or None for key in ("layers", "heads")}
    said |= {"recipe": _recipe(manifest), "attention": ",".join(request.attention or ())}
    said |= {"seed": request.seed if request.draws else None, "device": None if device == "cpu" else device}
    said |= {"config": None if request.edits is None else "edit.yaml"}
    given = [f"--{k.replace('_', '-')} {shlex.quote(str(said[k]))}" for k in _FLAGS if said[k] is not None]
    given += ["--fold-norm"] if request.fold_norm else []
    given += [f"--exclude {shlex.quote(pattern)}" for pattern in request.exclude or ()]
    verb = "apply" if manifest.adapter is None else f"lora --for {manifest.adapter.runtime}"
    return " ".join([f"qkpatch {verb}", source, *given, "-o OUT"])


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
    below = "; what else may be behind a difference is told below"
    how = below if comparison.doubts else " with the same call"
    yield (
        f"{_MEASURED}{comparison.tool}, by whoever made it, both models{how}. Base: "
        f"`{_cell(comparison.base)}`; patched: `{_cell(comparison.patched)}`.\n\n"
        "| task | metric | questions | base | patched | difference | paired, 95 % interval | questions that differ |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    yield "".join(_row(metric) for metric in comparison.metrics)
    if comparison.tool != "lmms-eval":
        yield "\nPaired: where 95 % of the differences over pictures drawn anew lie; with 0 in it, it may be chance.\n"
    elif any(metric.paired is not None for metric in comparison.metrics):
        yield "\nPaired: the mean of the differences, question by question, ± 1.96 standard errors.\n"
    else:
        yield "\nThe samples of the runs were not at hand, so there is no interval: small differences may be chance.\n"
    if comparison.doubts:
        yield f"\n**Not the model alone:** {'; '.join(comparison.doubts)}.\n"


def _row(metric: Metric) -> str:
    paired, figures = metric.paired, (metric.base, metric.patched)
    base, patched = ("-" if figure is None else f"{figure:.4f}" for figure in figures)
    difference = "-" if metric.difference is None else f"{metric.difference:+.4f}"
    interval = "-" if paired is None else paired.interval
    differing = "-" if paired is None or paired.changed is None else f"{paired.changed} of {paired.n}"
    n = "-" if metric.n is None else str(metric.n)
    return (
        f"| {_cell(metric.task)} | {_cell(metric.name)} | {n} | {base} | {patched} "
        f"| {difference} | {interval} | {differing} |\n"
    )


def _cell(text: str) -> str:
    """Text out of a file, in a table or as code."""
    return plain(text).replace("|", "\\|").replace("`", "'").replace("<", "‹")


def _heading(title: str) -> str:
    """What a directory is called, or a repository, as one line that is no markup; once more changes nothing."""
    return cut(plain(title).replace("`", "'").replace("<", "‹"), 255).strip()
