"""qkpatch: edit the query-key product of a safetensors checkpoint, tensor by tensor.

What is called from outside is in :mod:`qkpatch.api`, and here by the same names, as ``_CALLS`` lists them.
The rooms, from the surface down; imports only run downwards, as ``tests/test_architecture.py`` draws them:

* ``cli``         parses, calls the api, shows;
* ``api``         the library: one function for what each command does;
* ``cluster``     one OUT by several machines: parts, and what publishes them;
* ``uploads``     OUT in a store: claimed, made object by object, its manifest last;
* ``sweeps``      many edits from one read: the grid, figures, what evaluates them;
* ``adapters``    the edit as a low-rank adapter, beside the checkpoint;
* ``compare``     proof and difference: ``verify``, ``diff``, what may be replaced, what may be published;
* ``evaluation``  what a model says about pictures: measured, compared, a setting searched for;
* ``diagnosis``   which recipe fits a checkpoint, and a draft where none does;
* ``reports``     pages to look at, one file each;
* ``publishing``  the model card, and the commit that carries it;
* ``patches``     patch files, edits in place, and the way back;
* ``patching``    the engine: files are carried while heads are edited;
* ``planning``    the request, the plan, the manifest;
* ``model``       from SOURCE to the tensors of its language model;
* ``recipes``     model families as data;
* ``hub``         repositories by commit, commits;
* ``stores``      folders at any URL that fsspec knows, byte ranges, objects in parts;
* ``output``      which files OUT has, how they grow, how they appear;
* ``checkpoint``  files, headers, directories; knows no algebra;
* ``spectral``    the maths on tensors; knows no files;
* ``common``      text, JSON, YAML, ranges, signals, what only Linux has;
* ``errors``      every failure that can be explained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from qkpatch.api import *  # noqa: F403

_CALLS = (
    "apply", "apply_in_place", "card", "collect", "diff", "evaluate", "finish", "lora", "make_patch", "patch_model",
    "patched", "plan", "recipe_for", "revert", "spectra", "sweep", "tune", "verify",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """The calls and the version, once one is used: ``import qkpatch`` by itself reads nothing else."""
    if name in _CALLS:
        from qkpatch import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("qkpatch")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CALLS, "__version__"])
