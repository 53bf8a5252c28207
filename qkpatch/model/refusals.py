"""Layouts that qkpatch recognises and does not edit, each with its name and the way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from qkpatch.checkpoint.header import TensorRef
from qkpatch.common.dtypes import EDITABLE
from qkpatch.errors import CheckpointError, UnsupportedError
from qkpatch.recipes.refused import refused_kinds

# Whatever a family calls a norm of its queries or keys: q_norm, query_layernorm, qk_layer_norm, norm_k, qnorm, q_ln.
_QK_NORM = re.compile(
    r"(?:^|[._])(?:q|k|qk|query|key)_?(?:layer_?|rms_?)?(?:norms?|ln)(?:[._]|$)"
    r"|(?:^|[._])(?:layer_?|rms_?)?(?:norms?|ln)_?(?:q|k|qk|query|key)(?:[._]|$)",
    re.IGNORECASE,
)

# An indexer picks the tokens that are attended to, by queries and keys of its own.
_OF_INDEXER = re.compile(r"\.indexer\.|\.index_")
# What stands beside, or in place of, `q_proj.weight` when a method has quantised it; first match names it.
_COMPANIONS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"qweight", "qzeros", "scales", "g_idx"}), "GPTQ"),
    (frozenset({"qweight", "qzeros", "scales"}), "AWQ"),
    (frozenset({"weight_packed", "weight_global_scale"}), "compressed-tensors NVFP4"),
    (frozenset({"weight_packed"}), "compressed-tensors"),
    (frozenset({"weight.absmax"}), "bitsandbytes 4-bit"),
    (frozenset({"SCB"}), "bitsandbytes 8-bit"),
    (frozenset({"weight_scale_inv"}), "FP8"),
    (frozenset({"weight_scale", "weight_scale_2"}), "ModelOpt"),
    (frozenset({"weight_scale"}), "compressed-tensors or ModelOpt"),
    (frozenset({"scales", "biases"}), "MLX"),
)
_NO_WAY = "this family cannot be edited by qkpatch"
_WAY_OUT = "patch the unquantised checkpoint, then quantise the result"


def refuse_quantised(module: str, weight: TensorRef | None, suffixes: Collection[str]) -> None:
    """Raise where ``module`` is quantised; ``suffixes`` are the names stored under it (``weight``, ``scales``...)."""
    present = set(suffixes)
    for companions, method in _COMPANIONS:
        if companions <= present:
            what = f"quantised with {method}: stored as {', '.join(sorted(present))}"
            raise UnsupportedError(what, where=module, fix=_WAY_OUT)
    if any(suffix.startswith("base_layer.") for suffix in present) and weight is None:
        fix = "merge the adapter into the weights first"
        raise UnsupportedError("wrapped by an adapter (base_layer)", where=module, fix=fix)
    if weight is not None and weight.dtype not in EDITABLE:
        what = f"stored as {weight.dtype}, not as one of {', '.join(EDITABLE)}"
        raise UnsupportedError(what, where=weight.name, fix=_WAY_OUT)


def quantised_by_name(config: Mapping[str, Any], tensors: Iterable[TensorRef]) -> str | None:
    """By what method config.json says that the model is quantised, where nothing that is stored is; None otherwise."""
    sections = (config, *(section for section in config.values() if isinstance(section, dict)))
    told = (section.get("quantization_config") for section in sections)
    said = next((said for said in told if isinstance(said, dict)), None)
    marks = {suffix for companions, _ in _COMPANIONS for suffix in companions}
    is_plain = all(
        ref.dtype in (*EDITABLE, "I64", "BOOL") and not marks & {ref.name.rpartition(".")[2]}
        for ref in tensors
    )
    return str(said.get("quant_method", "some method")) if said is not None and is_plain else None


# What training leaves in names, and how to save without it.
_WRAPPERS = (
    (r"(?:^|\.)_orig_mod\.", "_orig_mod.", "torch.compile", "save model._orig_mod"),
    (r"(?:^|\.)_orig_module\.", "_orig_module.", "an optimiser's wrapper", "save what it wraps"),
    (r"(?:^|\.)_fsdp_wrapped_module\.", "_fsdp_wrapped_module.", "FSDP", "save a full state dict"),
    (r"^base_model\.model\.", "base_model.model.", "PEFT", "save model.merge_and_unload()"),
    (r"^module\.", "module.", "DataParallel", "save model.module"),
)


def refuse_known(names: Iterable[str], config: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise for attention kinds that have no per-head query-key product of stored weights."""
    kin = [section.get("model_type") for section in config.values() if isinstance(section, dict)]
    words = str([config.get("model_type"), config.get("architectures"), *kin]).lower()
    kinds = [kind for kind in refused_kinds() if kind.tensors is not None and kind.word in words]
    for name in names:
        for kind in kinds:
            if kind.tensors is not None and kind.tensors.search(name):
                raise UnsupportedError(kind.reason, where=name, fix=_NO_WAY)


def refuse_class(config: Mapping[str, Any]) -> None:
    """Raise for a class that has no such product whatever its tensors are called, quantised or of another program."""
    named = config.get("architectures")
    for kind in refused_kinds():
        for name in named if isinstance(named, list) else ():
            if name in kind.architectures:
                raise UnsupportedError(
                    f"{name}: {kind.reason}", where="config.json: architectures", fix=_NO_WAY
                )


def refuse_wrapped(names: Iterable[str]) -> None:
    """Raise where training left its own prefix in the names: transformers would find none of them."""
    wrappers = [(re.compile(pattern), told) for pattern, *told in _WRAPPERS]
    for name in names:
        for pattern, (prefix, who, cure) in wrappers:
            if pattern.search(name):
                fix = f"{cure}, or rename the tensors without it: no loader knows them so"
                raise CheckpointError(f"names hold {prefix!r}, which {who} left there", where=name, fix=fix)


def is_qk_norm(name: str) -> bool:
    """Whether a tensor's name is that of a norm of queries or keys."""
    small = name.lower()  # a mixture of experts has 10^5 names without either word
    return ("norm" in small or "ln" in small) and bool(_QK_NORM.search(name)) and not _OF_INDEXER.search(name)


def suffixes_by_module(names: Iterable[str], modules: Collection[str]) -> dict[str, list[str]]:
    """For each of ``modules``, what is stored under it: ``a.q_proj.weight`` -> ``{"a.q_proj": ["weight"]}``."""
    found: dict[str, list[str]] = {module: [] for module in modules}
    # There are few: a name of nothing but dots is not cut at each of them.
    lengths = sorted({len(module) for module in found})
    for name in names:
        for dot in lengths:
            if name[dot : dot + 1] == "." and name[:dot] in found:
                found[name[:dot]].append(name[dot + 1 :])
    return found
