"""The options that commands share, in groups: a flag that is added to a group is in every command that has it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from qkpatch.checkpoint.tree import near_paths, source_file
from qkpatch.cli.groups import flag
from qkpatch.errors import FileSystemError, UsageError
from qkpatch.output.options import Digest, Writing
from qkpatch.planning.request import Request, parse_request
from qkpatch.spectral.rule import Channel, Select

SourceArg = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        # In brackets, a revision would be markup, and not be shown on a terminal.
        help="Checkpoint directory, .safetensors file, URL in a store, Hub id (org/name, org/name@revision) or recipe.",
        show_default=False,
    ),
]
ExcludeOpt = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="GLOB",
        help="Leave out these files and folders of SOURCE: checkpoint-100, *.gguf; repeatable.",
        show_default=False,
    ),
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output of qkpatch.")]
ForceOpt = Annotated[bool, typer.Option("--force", help="With --overwrite: replace OUT whatever it holds.")]
InPlaceOpt = Annotated[
    bool, typer.Option("--in-place", help="Rewrite the rows of SOURCE itself; `qkpatch revert` leads back.")
]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
CsvOpt = Annotated[bool, typer.Option("--csv", help="Print the result as a table for programs.")]
MarkdownOpt = Annotated[
    bool, typer.Option("--markdown", help="Print the result as Markdown, for a comment on a pull request.")
]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Warnings are errors: exit code 6.")]
QuietOpt = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
DebugOpt = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="QKPATCH_DEBUG")]


def expanded(path: Path | None) -> Path | None:
    """``~`` as the shell would have it, had it seen it; a URL is no path."""
    if path is not None:
        from qkpatch.model.locate import out_url

        try:
            out_url(path)
        except UsageError as error:
            raise typer.BadParameter("it is a URL, and is to be a path") from error
    return None if path is None else Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises for ~nobody


def place_of(text: str) -> Path | str:
    """OUT: a path, or a URL as it was written."""
    from qkpatch.model.locate import out_url

    if not text:
        raise UsageError("OUT is empty", fix="name it; is a variable of the shell unset?")
    if text.lower().startswith("memory://"):
        what = "what is at memory:// is gone when this command ends"
        raise UsageError(what, where=text, fix="a directory, or an OUT at s3://, gs:// or az://")
    return text if out_url(text) else Path(os.path.expanduser(text))  # noqa: PTH111 - as above


def named(text: str) -> Path:
    """A path that must be there; an empty one is no current directory."""
    if not text:
        raise typer.BadParameter("it is empty; is a variable of the shell unset?")
    return Path(text)


OutOpt = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="Directory to write, or a URL in a store.",
        show_default="SOURCE's name, qkpatch, a hash of the edit",
    ),
]
OutOrUrlArg = Annotated[
    str, typer.Argument(metavar="OUT", help="What `apply` wrote, a directory or a URL.", show_default=False)
]
OutArg = Annotated[
    Path, typer.Argument(metavar="OUT", help="What `apply` wrote.", show_default=False, parser=named)
]


def check_present(out: Path) -> None:
    """Raise :class:`FileSystemError` where OUT is no directory."""
    if not out.is_dir():
        near = near_paths(str(out))
        fix = f"near: {', '.join(near)}" if near else "check the path"
        raise FileSystemError("no such directory", where=str(out), fix=fix)


@dataclass(frozen=True)
class HeadFlags:
    """Which modes of which heads."""

    layers: str | None = flag(None, "Inclusive list such as 10-18,20.", "the recipe's", metavar="LIST")
    modes: int | None = flag(None, "Modes per head; with --energy the most.", "the recipe's, or half of all")
    min_modes: int | None = flag(None, "With --energy: the least.", "1")
    energy: float | None = flag(None, "As many modes as hold this share of energy.", "off")
    channel: Channel | None = flag(None, "Part of the product to edit.", "full")
    heads: str | None = flag(None, "Query heads, such as 0-3,7.", "all", metavar="LIST")
    recipe: str | None = flag(
        None, "Use this recipe, or this YAML file, instead of the recipe that fits.", metavar="NAME"
    )
    prefix: str | None = flag(
        None,
        "With --recipe: what names of the language model's layers begin with, 'llm.h.{layer}.'.",
        "the recipe's",
        metavar="TEXT",
    )
    attention: str | None = flag(None, "Sets of tensors, such as self,cross.", "the recipe's first")
    fold_norm: bool = flag(False, "Take the gain of the RMSNorm before attention into the product.")
    config: Path | None = flag(
        None, "The settings as a YAML file; flags win, not over its edits.", metavar="EDIT.yaml"
    )

    @property
    def request(self) -> Request:
        """The flags over ``--config``; None where neither says anything."""
        said = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "config"}
        # A flag that is not given says nothing, so that --config may say it.
        flags = Request.of(**{**said, "fold_norm": self.fold_norm or None})
        if self.config is None:
            return flags
        file = source_file(self.config, self.config.name)  # a regular one: a pipe or a device would never end
        return flags.over(parse_request(file.read(), str(self.config)))


@dataclass(frozen=True)
class EditFlags(HeadFlags):
    """The edit, in the flags that `apply`, `plan` and whatever plans an edit share."""

    alpha: float | None = flag(
        None, "Factor of the selected modes, 0 to 1: 0 removes them, 1 changes nothing.", "0.8"
    )
    select: Select | None = flag(None, "Modes to edit; all but dominant are controls.", "dominant")
    seed: int | None = flag(None, "For --select random and subspace.", "0")


@dataclass(frozen=True)
class LookFlags(HeadFlags):
    """What is looked at; of an edit in ``--config``, alpha, select and seed mean nothing to that."""

    layers: str | None = flag(None, "Inclusive list such as 10-18,20.", "all", metavar="LIST")
    modes: int | None = flag(None, "r of energy share and gap; with --energy the most.", "the recipe's")
    channel: Channel | None = flag(None, "Part of the product to look at.", "full")
    exclude: ExcludeOpt = None


@dataclass(frozen=True)
class CopyFlags:
    """What of SOURCE goes into OUT, and into which shards."""

    max_shard_size: str | None = flag(
        None, "Shard OUT anew, in at most 5GB, 512MiB, ... each.", "as SOURCE", metavar="SIZE"
    )
    exclude: ExcludeOpt = None

    def over(self, request: Request) -> Request:
        """``request`` with what these say."""
        return Request.of(**vars(self)).over(request)


@dataclass(frozen=True)
class RunFlags:
    """Where heads are computed."""

    device: str = flag("cpu", "cpu, cuda, cuda:i, or auto: cuda where there is one.")
    threads: int | None = flag(None, "Heads that are computed side by side.", "processors, within 450 MiB")


@dataclass(frozen=True)
class WriteFlags:
    """How OUT is written, or what in its place."""

    overwrite: OverwriteOpt = False
    force: ForceOpt = False
    digest: Digest = flag(
        Digest.edited, "SHA-256 of the edited tensors; of all files, as SHA256SUMS; or of nothing."
    )
    link: bool = flag(False, "Hard links to files of SOURCE that are not edited.")
    link_cache: bool = flag(False, "The same, even to files in the Hub cache.")
    resume: bool = flag(False, "Keep what is done where the run ends early, and take it over.")
    patch: Path | None = flag(None, "Take the edit, and its rows, from this patch file.", metavar="FILE")
    patch_only: bool = flag(False, "Write no OUT but a patch file, -o: the edited rows alone.")
    in_place: InPlaceOpt = False

    def writing(self, *, strict: bool) -> Writing:
        """What concerns a copy."""
        said = {field.name: getattr(self, field.name) for field in fields(Writing) if field.name != "strict"}
        return Writing(**said, strict=strict)


PartOpt = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Do this share alone, 3/8; the same without it takes all over. auto, or auto/8: as the scheduler says.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ClusterFlags:
    """How several machines share the work."""

    part: str | None = flag(
        None,
        "Write this share of OUT alone, 3/8, for `qkpatch finish`; auto, or auto/8: as the scheduler says.",
        metavar="I/N",
    )
    ray: str | None = flag(
        None,
        "Have Ray write all parts, and finish: its address, auto, or local; --part 8 says how many.",
        metavar="ADDRESS",
    )


@dataclass(frozen=True)
class PushFlags:
    """What is published, and where."""

    push: str | None = flag(None, "Publish OUT there, in one commit.", metavar="ORG/NAME")
    private: bool = flag(False, "With --push: a new repository is private.")
    create_pr: bool = flag(False, "With --push: a pull request instead of a commit.")
    include: list[str] | None = flag(
        None,
        "With --push: also this file, or glob, that SOURCE has by a link to elsewhere; repeatable.",
        metavar="NAME",
    )
    include_hidden: bool = flag(False, "With --push: also files that are private by name.")


@dataclass(frozen=True)
class ShowFlags:
    """What is printed besides errors, and what is an error."""

    as_json: JsonOpt = False
    quiet: QuietOpt = False
    strict: StrictOpt = False
    debug: DebugOpt = False

    @property
    def is_bare(self) -> bool:
        """Whether nothing is drawn for people."""
        return self.as_json or self.quiet
