"""What a place is that a model cannot be read from, by the names of its files, and what helps: ``recognised.yaml``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import filter as matches
from pathlib import Path

from qkpatch.checkpoint.tree import MAX_CONFIG_BYTES, SourceFile
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.common.strict_yaml import load_yaml
from qkpatch.errors import CheckpointError, UnsupportedError

ADAPTER = "adapter_config.json"


def refuse_folder(where: str, files: Mapping[str, SourceFile]) -> None:
    """Raise :class:`UnsupportedError` where a folder is plainly something else than a model's."""
    if error := _form("folders", where, files, files):
        raise error


def no_weights(
    where: str, files: Mapping[str, SourceFile], left_out: Collection[str] = ()
) -> UnsupportedError:
    """The error for a place without weights that qkpatch reads: what there is instead."""
    names = [*files, *left_out]
    what = f"no .safetensors weights, only {some(names) or 'an empty folder'}"
    fix = "point SOURCE at a Hugging Face checkpoint directory or a .safetensors file"
    known = _form("folders", where, files, files) or _form("weights", where, files, names)
    return known or UnsupportedError(what, where=where, fix=fix)


def _form(
    kind: str, where: str, files: Mapping[str, SourceFile], names: Collection[str]
) -> UnsupportedError | None:
    table = Path(__file__).with_suffix(".yaml")
    for form in load_yaml(table.read_bytes(), table.name)[kind]:
        found = [[n for glob in mark.split("|") for n in matches(names, glob)] for mark in form["marks"]]
        if all(found):
            facts = {
                "base": _said(files.get(ADAPTER), "base_model_name_or_path") or "another model",
                "inner": some(_inner(files)) if "{inner}" in form["fix"] else "",
                "found": some(sorted(found[-1])),
            }
            what, fix = (form[key].format(**facts) for key in ("what", "fix"))
            return UnsupportedError(what, where=where, fix=fix)
    return None


def _inner(files: Mapping[str, SourceFile]) -> list[str]:
    folders = [name.rpartition("/")[0] for name in matches(files, "*/config.json")]
    kinds = {f: _said(files[f"{f}/config.json"], "model_type") for f in folders}
    return [f"{f} ({kind})" for f, kind in kinds.items() if kind and matches(files, f"{f}/*.safetensors")]


def _said(file: SourceFile | None, key: str) -> object:
    try:
        document = None if file is None else load_json(file.read(MAX_CONFIG_BYTES), file.name)
    except CheckpointError:
        return None
    return document.get(key) if isinstance(document, dict) else None
