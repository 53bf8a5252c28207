"""The page of errors and warnings: what each says, and its cure, from the source of the package."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import typer
import yaml

from qkpatch.cli import app
from qkpatch.recipes.refused import refused_kinds
from scripts.docs.commands import names
from scripts.docs.errors.package import Package
from scripts.docs.errors.source import Said, says_something
from scripts.markdown import WIDTH, joined

HEAD = """\
An error says what happened, where, and what helps:

```text
Error: layer 99 is out of range: the language model has 9 layers, 0-8
  where  --layers 99
```

**To find yours, search this page for words of it that are no names or numbers**: `{{braces}}` stand for those. Behind
the arrow is the cure. Where there is none, the text says what is wrong, and the head of its section what helps. With
`--json` an error is `{{"error": {{"kind", "what", "where", "fix", "exit_code"}}}}`, from Python a
[`QKPatchError`](api.md#qkpatcherror) with the same facts. Written by `make docs` from the source: {n} messages.
"""

# Exit codes, in this order; of each what it means, and what there is beside its errors.
CODES = {
    1: "Something is not as it should be. `verify` prints its mismatches, `diff` its differences and `tune` "
    "its reasons as results, not as errors, and end with 1 as well.",
    2: "The request is wrong: nothing was done. Typos in commands and options are told with what comes near.",
    3: "The checkpoint is broken, not supported, or fits no recipe, or more than one. Nothing was written.",
    4: "Files, memory, other limits of the machine, and the Hub. OUT appears whole or not at all: after the "
    "cure, run the same command again; with `--resume` it goes on.",
    5: "A fault of qkpatch's own, which says nothing of the checkpoint. Please report it, with the traceback "
    "that it prints and the output of `qkpatch doctor`.",
    6: "With `--strict`: a warning that would else be printed and passed over. Nothing was written.",
}  # fmt: skip
# What helps with all of a kind, where a message has no cure of its own.
HELP = {
    "MismatchError": "Make OUT anew: `qkpatch apply` with the same edit gives the same bytes. A SOURCE that "
    "changed since is the commonest cause: `--source` must be what OUT was made from.",
    "UsageError": "`qkpatch COMMAND --help` shows what a command takes; [the guide](guide.md) says what it is "
    "for.",
    "RecipeError": "A YAML file, of a recipe, of settings (`--config`) or of a grid, is malformed. All its "
    "faults are told at once, each behind the path of its key (`$.tensors.query: missing`). Keys of recipes are "
    "in [configs/README.md](../configs/README.md), those of settings and grids in [the guide](guide.md#the-edit).",
    "HeaderError": "A safetensors file breaks its format. Nearly always a download that broke off: fetch that "
    "file again.",
    "CheckpointError": "Parts of the checkpoint contradict each other. Compare with the repository that it "
    "came from; `qkpatch recipes check SOURCE` says what does not fit.",
    "UnsupportedError": "qkpatch knows what this is, and does not edit it. [Models](models.md#refused) has "
    "the reasons.",
    "AmbiguousError": "It is not clear which recipe, or which weights, are meant. `qkpatch recipes check "
    "SOURCE` explains, and drafts a recipe for an unknown family: [how](../configs/README.md).",
    "NumericalError": "Numbers are not finite, or the edit would do nothing. `qkpatch inspect SOURCE --layers "
    "N` shows the spectra of the layer that is named.",
    "FileSystemError": "Reading or writing failed, or there is not enough disk or memory: `qkpatch plan "
    "SOURCE -o OUT` says how much it takes, `qkpatch doctor` how much there is. `{doing}` is copy, create, list, "
    "open, publish, read, remove, rename, sync, write or the like; `{reason}` is the system's word for it.",
    "WarnedError": "Mend what is warned of, or leave out `--strict`.",
    "Warnings": "What is warned of. Without `--strict` it is told, and recorded in the manifest where it is about OUT.",
    "UnexpectedError": "It is called what Python calls it.",
    "StoreError": "A store could not deliver, or did not take ([stores](stores.md)).",
    "HubError": "The Hub could not deliver, or did not accept. `qkpatch doctor` says whether it is reached "
    "and whether there is a token; [Hub](hub.md).",
}  # fmt: skip
# What a room is about, in the reader's words: the heads of long lists.
SUBJECTS = {
    "Checkpoints and recipes": ("checkpoint", "model", "recipes", "diagnosis"),
    "Numbers, lists, YAML and JSON": ("common", "errors"),
    "The edit": ("planning", "spectral", "patching"),
    "OUT": ("output", "compare", "api", "cli"),
    "Patch files and edits in place": ("patches",),
    "Adapters": ("adapters",),
    "Sweeps": ("sweeps",),
    "Reports": ("reports",),
    "`evaluate` and `tune`": ("evaluation",),
    "The Hub, cards and publishing": ("hub", "publishing"),
    "Stores": ("stores", "uploads"),
    "Several machines": ("cluster",),
}
COMMANDS = sorted({name[0] for name in names(typer.main.get_command(app)) if name})
FEW = 3  # places that are told
ALIKE = 4  # messages of one cure, from which on it is said once
MANY = 30  # messages of a kind, from which on they are divided by subject
FLAG = "--"
_PLACE = re.compile(r"--[a-z]|config\.json|stdout")
_FLAGS = r"--[a-z][\w-]*(?: (?:--[a-z][\w-]*|[A-Z]{2,}(?![\w']*[a-z])[\w./]*|org/name))*"
# What is typed, or is a name, in a cure: commands, flags, names in braces with what touches them, names of files.
_LITERAL = re.compile("|".join([
    rf"qkpatch (?:{'|'.join(COMMANDS)})\b(?: (?:check|[A-Z]{{2,}}|org/name|-o|{_FLAGS}|\{{[^{{}}]*\}}))*",
    rf"{_FLAGS}|-o\b(?: OUT)?",
    r"pip install (?:--[\w-]+ )?(?:'[^']*'|\{[^{}]*\}|\w+)",
    r"[\w.-]*\*[\w.*]+|<\w+>|\w+\.(?:py|json|yaml|html)\b",
    r"[^\s,;:()'{}]*(?:\{[^{}]*\}[^\s,;:()'{}]*)+|\b[a-z]\w*_\w+(?:\([^()]*\))?",
]))  # fmt: skip


def page(repo: Path) -> str:
    """A chapter per exit code, a section per class, a line per message with what helps."""
    package = Package(repo / "qkpatch")
    said = [*package.said, *_from_tables(repo, package)]
    by_kind: dict[str, list[Said]] = {}
    for one in said:
        if not one.is_passed_on:
            by_kind.setdefault(_public(package, one.kind), []).append(one)
    blocks: list[str] = []
    n = 0
    for code, meaning in CODES.items():
        blocks += [f"## Exit code {code}", meaning]
        for name, kind in package.kinds.items():
            if name not in by_kind or kind.exit_code != code:
                continue
            blocks += [f"### {name}", HELP[name]]
            for subject, messages in _divided(by_kind[name]).items():
                lines = list(_lines(messages))
                n += len({one.what for one in messages})
                blocks += [*([f"#### {_head(name, subject)}"] if subject else []), "\n".join(lines)]
    text = joined(["# Errors, and what helps", "HEAD", *blocks])
    return text.replace("HEAD\n", HEAD.format(n=n), 1)


def _head(kind: str, subject: str) -> str:
    return f"{subject} ({kind.removesuffix('Error').lower()})"


def _public(package: Package, name: str) -> str:
    """The class of :mod:`qkpatch.errors` that an error is one of, which is what callers catch."""
    while not package.kinds[name].module.endswith(".errors") or package.kinds[name].module.count(".") > 1:
        name = package.kinds[name].base
    return name


def _from_tables(repo: Path, package: Package) -> Iterator[Said]:
    """What errors say from data: what a folder is taken for, and why some attention is refused."""
    table = repo / "qkpatch" / "checkpoint" / "recognised.yaml"
    for forms in yaml.safe_load(table.read_text("utf-8")).values():
        for form in forms:
            yield Said("UnsupportedError", form["what"], "", form["fix"], "qkpatch.checkpoint.recognised", 0)
    (fix,) = {
        one.fix for one in package.said if one.module == "qkpatch.model.refusals" and "{reason}" in one.what
    }
    for kind in refused_kinds():
        yield Said("UnsupportedError", kind.reason, "", fix, "qkpatch.model.refusals", 0)


def _divided(messages: list[Said]) -> dict[str, list[Said]]:
    if len({one.what for one in messages}) < MANY:
        return {"": messages}
    subject_of = {room: subject for subject, rooms in SUBJECTS.items() for room in rooms}
    found: dict[str, list[Said]] = {subject: [] for subject in SUBJECTS}
    for one in messages:
        room = one.module.split(".")[1]
        found[subject_of[room]].append(one)
    return {subject: some for subject, some in found.items() if some}


def _lines(messages: Iterable[Said]) -> Iterator[str]:
    """A list, by what is said; with its cures, the longest of those that begin alike."""
    cures: dict[str, list[str]] = {}
    places: dict[str, list[str]] = {}
    for one in messages:
        cures.setdefault(one.what, []).append(one.fix)
        places.setdefault(one.what, []).append(one.where)
    by_cures: dict[tuple[str, ...], list[str]] = {}
    for what in sorted(cures, key=_without_names):
        told = sorted({cure for cure in cures[what] if says_something(cure)})
        told = [cure for cure in told if not any(o != cure and o.startswith(cure) for o in told)]
        where = sorted(
            {place.partition(" {")[0].rstrip(":") for place in places[what] if _PLACE.match(place)}
        )
        shown = f" ({', '.join(map(_code, where))})" if 0 < len(where) < FEW and FLAG not in what else ""
        by_cures.setdefault(tuple(told), []).append(_code(" ".join(what.split())) + shown)
    for common, alike in sorted(by_cures.items(), key=lambda pair: len(pair[1]) >= ALIKE and bool(pair[0])):
        yield from _items(alike, [_prose(cure) for cure in common])


def _items(said: Sequence[str], cures: Sequence[str]) -> Iterator[str]:
    """Messages and their cures; one cure of many messages stands at their head."""
    if len(cures) == 1 and len(said) >= ALIKE:
        yield _wrapped(f"→ {cures[0]}:", "* ", "  ")
        yield from (_wrapped(one, "    * ", "      ") for one in said)
        return
    for one in said if len(cures) <= 1 else [", ".join(said)]:
        if len(cures) == 1:
            yield _wrapped(f"{one} → {cures[0]}", "* ", "  ")
            continue
        yield _wrapped(one + (" →" if cures else ""), "* ", "  ")
        yield from (_wrapped(cure, "    * ", "      ") for cure in cures)


def _without_names(text: str) -> str:
    return re.sub(r"\{[^{}]*\}|[^\w ]", "", text).strip().lower()


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _prose(text: str) -> str:
    """A cure, with commands, flags and names in braces as code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else _LITERAL.sub(r"`\g<0>`", part) for part in parts)


def _wrapped(text: str, first: str, other: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=other,
        break_long_words=False,
        break_on_hyphens=False,
    )
