"""Layouts that qkpatch recognises and does not edit, each with its name and the way out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from qkpatch.checkpoint.header import TensorRef
from qkpatch.errors import UnsupportedError

EDITABLE_DTYPES = ("F64", "F32", "F16", "BF16")

# Whatever a family calls a norm of its queries or keys: q_norm, query_layernorm, qk_layer_norm, norm_k, qnorm, q_ln.
_QK_NORM = re.compile(
    r"(?:^|[._])(?:q|k|qk|query|key)_?(?:layer_?|rms_?)?(?:norms?|ln)(?:[._]|$)"
    r"|(?:^|[._])(?:layer_?|rms_?)?(?:norms?|ln)_?(?:q|k|qk|query|key)(?:[._]|$)",
    re.IGNORECASE,
)

# What stands beside, or in place of, `q_proj.weight` when a method has quantised it; first match names it.
_COMPANIONS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"qweight", "qzeros", "scales", "g_idx"}), "GPTQ"),
    (frozenset({"qweight", "qzeros", "scales"}), "AWQ"),
    (frozenset({"weight_packed", "weight_global_scale"}), "compressed-tensors NVFP4"),
    (frozenset({"weight_packed"}), "compressed-tensors"),
    (frozenset({"weight.absmax"}), "bitsandbytes 4-bit"),
    (frozenset({"SCB"}), "bitsandbytes 8-bit"),
    (frozenset({"weight_scale_inv"}), "block FP8"),
    (frozenset({"weight_scale", "weight_scale_2"}), "ModelOpt"),
    (frozenset({"weight_scale"}), "compressed-tensors or FP8"),
    (frozenset({"scales", "biases"}), "MLX"),
)
_WAY_OUT = "patch the unquantised checkpoint, then quantise the result"


def refuse_quantised(module: str, weight: TensorRef | None, suffixes: Collection[str]) -> None:
    """Raise where ``module`` is quantised; ``suffixes`` are the names stored under it (``weight``, ``scales``...)."""
    present = set(suffixes)
    for companions, method in _COMPANIONS:
        if companions <= present:
            raise UnsupportedError(
                f"quantised with {method}: stored as {', '.join(sorted(present))}", where=module, fix=_WAY_OUT
            )
    if any(suffix.startswith("base_layer.") for suffix in present) and weight is None:
        raise UnsupportedError(
            "wrapped by an adapter (base_layer)", where=module, fix="merge the adapter into the weights first"
        )
    if weight is not None and weight.dtype not in EDITABLE_DTYPES:
        raise UnsupportedError(
            f"stored as {weight.dtype}, not as one of {', '.join(EDITABLE_DTYPES)}",
            where=weight.name,
            fix=_WAY_OUT,
        )


def refuse_known(names: Iterable[str]) -> None:
    """Raise for attention kinds that have no per-head query-key product of stored weights."""
    for name in names:
        if ".kv_a_proj_with_mqa." in name or ".kv_b_proj." in name:
            raise UnsupportedError(
                "multi-head latent attention (MLA): keys are expanded from a shared latent, "
                "so there is no stored key weight per head",
                where=name,
                fix="this family cannot be edited by qkpatch",
            )


def query_temperature(name: str) -> UnsupportedError:
    """The error for logits whose scale depends on the query rows: editing those would do more than M shows."""
    return UnsupportedError(
        "queries and values are scaled by a temperature computed from the queries themselves (Moondream 3)",
        where=name,
        fix="this family cannot be edited by qkpatch",
    )


def missing_key(layer: int, query: str, key: str) -> UnsupportedError:
    """The error for a layer with queries and no keys of its own."""
    return UnsupportedError(
        f"layer {layer} has a query weight and no key weight {key}",
        where=query,
        fix="if it shares another layer's keys, leave it out of --layers",
    )


def is_qk_norm(name: str) -> bool:
    """Whether a tensor's name is that of a norm of queries or keys."""
    # An indexer picks the tokens that are attended to, by queries and keys of its own.
    return _QK_NORM.search(name) is not None and ".indexer." not in name


def unknown_form(module: str, suffixes: Iterable[str]) -> UnsupportedError:
    """The error for a module whose weight is stored in a way that qkpatch has no name for."""
    return UnsupportedError(
        f"stored as {', '.join(sorted(suffixes))}, a form that qkpatch does not know",
        where=module,
        fix="patch the unquantised checkpoint, or merge what stands beside the weight into it",
    )


def undeclared_norm(name: str, recipe: str) -> UnsupportedError:
    """The error for a query or key norm that the recipe does not know of: the product would be another one."""
    return UnsupportedError(
        f"queries or keys are normalised, which recipe {recipe} does not declare",
        where=name,
        fix="choose a recipe for this family with --recipe",
    )


def suffixes_by_module(names: Iterable[str], modules: Collection[str]) -> dict[str, list[str]]:
    """For each of ``modules``, what is stored under it: ``a.q_proj.weight`` -> ``{"a.q_proj": ["weight"]}``."""
    wanted = set(modules)
    found: dict[str, list[str]] = {module: [] for module in wanted}
    for name in names:
        dot = name.find(".")
        while dot >= 0:
            if name[:dot] in wanted:
                found[name[:dot]].append(name[dot + 1 :])
            dot = name.find(".", dot + 1)
    return found
