"""What a place is that a model cannot be read from, by the names of its files, and what helps then."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import filter as matches
from typing import NamedTuple

from qkpatch.checkpoint.tree import MAX_CONFIG_BYTES, SourceFile
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.errors import CheckpointError, UnsupportedError

ADAPTER = "adapter_config.json"


class Form(NamedTuple):
    """One kind of place: each of its marks, globs with ``|`` between them, is the name of a file or folder."""

    marks: tuple[str, ...]
    what: str  # {base} is an adapter's; {inner} are folders that hold a model; {found} is what the last mark means
    fix: str


# What a folder is. The first whose marks are all there, in this order.
FOLDERS = (
    Form(
        (ADAPTER,), "this is an adapter (LoRA) of {base}",
        "merge it first: in peft, load the base and the adapter, merge_and_unload(), save_pretrained(...)",
    ),
    Form(
        ("models--*/snapshots/*",), "this is a Hub cache of whole repositories",
        "name one of them as org/name, or give one snapshot: {inner}",
    ),
    Form(
        ("snapshots/*/*",), "this is a repository's root in a Hub cache",
        "give the snapshot of a commit: {inner}; or name the repository as org/name",
    ),
    Form(
        ("model_index.json",), "this is a diffusers pipeline, of several models",
        "point SOURCE at its language model: {inner}",
    ),
    Form(
        ("params.json", "consolidated*"), "these are weights for the vendor's own code: params.json and {found}",
        "take the model in its transformers form: config.json and model*.safetensors",
    ),
)  # fmt: skip
# And in what form weights are, where no safetensors are.
WEIGHTS = (
    Form(
        ("*/config.json", "*/*.safetensors"), "no .safetensors weights here; models lie in folders below",
        "point SOURCE at the language model's: {inner}",
    ),
    Form(
        ("*.distcp",), "only shards of a training under way (torch.distributed.checkpoint): {found}",
        "gather them: accelerate merge-weights",
    ),
    Form(
        ("global_step*",), "only DeepSpeed's shards of a training under way: {found}",
        "gather them: python zero_to_fp32.py . OUT --safe_serialization, and add config.json",
    ),
    Form(("checkpoint-[0-9]*",), "a training run, whose models lie below", "point SOURCE at one: {found}"),
    Form(
        ("*.bin|*.pt|*.pth|*.ckpt",), "only pickled weights: {found}; qkpatch never unpickles",
        "convert them: load the model in transformers and call save_pretrained(..., safe_serialization=True)",
    ),
    Form(
        ("*.gguf",), "only weights for llama.cpp (GGUF): {found}",
        "patch the safetensors checkpoint that it was made from, then convert that: convert_hf_to_gguf.py",
    ),
    Form(
        ("*.h5|*.msgpack|*.onnx|*.npz",), "no .safetensors weights, only another framework's: {found}",
        "patch the safetensors checkpoint of this model, then convert that",
    ),
)  # fmt: skip


def recognise(
    forms: Collection[Form], where: str, files: Mapping[str, SourceFile], others: Collection[str] = ()
) -> UnsupportedError | None:
    """The error that says what a place is instead; None where it is none of ``forms``.

    Args:
        forms: what it may be.
        where: what messages call it.
        files: all that is there.
        others: names of what is there and left out.
    """
    names = [*files, *others]
    for form in forms:
        found = [[n for glob in mark.split("|") for n in matches(names, glob)] for mark in form.marks]
        if all(found):
            facts = {
                "base": _base(files) if ADAPTER in form.marks else "",
                "inner": some(list(_inner(files))) if "{inner}" in form.fix else "",
                "found": some(sorted(found[-1])),
            }
            return UnsupportedError(form.what.format(**facts), where=where, fix=form.fix.format(**facts))
    return None


def no_weights(
    where: str, files: Mapping[str, SourceFile], left_out: Collection[str] = ()
) -> UnsupportedError:
    """The error where there are no weights that qkpatch reads: what there is, and what helps."""
    return recognise((*FOLDERS, *WEIGHTS), where, files, left_out) or UnsupportedError(
        f"no .safetensors weights, only {some(sorted(files)) or 'an empty folder'}",
        where=where,
        fix="point SOURCE at a Hugging Face checkpoint directory or a .safetensors file",
    )


def _base(files: Mapping[str, SourceFile]) -> str:
    return str(_said(files[ADAPTER], "base_model_name_or_path") or "another model")


def _inner(files: Mapping[str, SourceFile]) -> Iterator[str]:
    """Folders that hold a model, and of what type it is."""
    for name, file in files.items():
        folder, _, last = name.rpartition("/")
        is_model = folder and last == "config.json" and matches(files, f"{folder}/*.safetensors")
        if is_model and (kind := _said(file, "model_type")) is not None:
            yield f"{folder} ({kind})"


def _said(file: SourceFile, key: str) -> object:
    try:
        document = load_json(file.read(MAX_CONFIG_BYTES), file.name)
    except CheckpointError:
        return None
    return document.get(key) if isinstance(document, dict) else None
