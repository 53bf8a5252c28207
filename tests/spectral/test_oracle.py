"""What ``apply`` stores and records equals a dense float64 computation, head by head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from conftest import build_tiny
from safetensors import safe_open
from typer.testing import Result

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
SHAPES = {
    "MHA": {"n_heads": 4, "n_kv_heads": 4},
    "GQA": {"n_heads": 6, "n_kv_heads": 3, "d_model": 20},
    "MQA": {"n_heads": 4, "n_kv_heads": 1},
    "GQA, d_head > d_model": {"n_heads": 4, "n_kv_heads": 2, "d_head": 12, "d_model": 10},
}
EDITS = [
    ("full", "dominant", 2, 0.25),
    ("full", "dominant", 3, 0.0),
    ("full", "bottom", 2, 0.5),
    ("full", "random", 2, 0.5),
    ("full", "shrink", 2, 0.5),
    ("symmetric", "dominant", 3, 0.25),
    ("symmetric", "bottom", 2, 0.0),
    ("symmetric", "random", 3, 0.5),
    ("symmetric", "shrink", 1, 0.5),
    ("antisymmetric", "dominant", 3, 0.25),
    ("antisymmetric", "bottom", 2, 0.0),
    ("antisymmetric", "random", 3, 0.5),
    ("antisymmetric", "shrink", 1, 0.5),
]
Run = Callable[..., Result]
decompose = cache(lambda q, k, channel: oracle.decompose(q.array, k.array, channel))


class Weight:
    """The rows of one head in float64, hashable, so that no decomposition is computed twice."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.double().numpy()
        self.bytes = self.array.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Weight) and self.bytes == other.bytes

    def __hash__(self) -> int:
        return hash(self.bytes)


@dataclass(frozen=True)
class Edit:
    """The flags of one call of ``apply``."""

    channel: str
    select: str
    modes: int
    alpha: float

    @property
    def paired(self) -> int:
        return self.modes + (self.modes % 2 if self.channel == "antisymmetric" else 0)

    def flags(self) -> tuple[object, ...]:
        return tuple(word for name, value in vars(self).items() for word in (f"--{name}", value))

    def chosen(self, dense: oracle.Dense, recorded: Iterable[int]) -> tuple[int, ...]:
        """The modes to edit, or for ``shrink`` to measure by; only ``random`` ones come from the manifest."""
        if self.select == "random":
            return tuple(recorded)
        select = "bottom" if self.select == "bottom" else "dominant"
        return oracle.choose(dense, self.channel, select, self.modes)

    def expected(self, q: Weight, k: Weight, recorded: Iterable[int]) -> oracle.Edited:
        """The edited head by the oracle."""
        dense = decompose(q, k, self.channel)
        chosen = self.chosen(dense, recorded)
        edited = oracle.edit(q.array, k.array, self.channel, chosen, self.alpha, dense)
        if self.select == "shrink":
            return oracle.Edited(oracle.shrink(q.array, like=edited.W_Q))
        return edited


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    tensors = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass(frozen=True)
class Outcome:
    """A checkpoint before and after ``apply``."""

    before: Mapping[str, torch.Tensor]
    after: Mapping[str, torch.Tensor]
    manifest: Mapping[str, Any]

    def heads(self, layers: Iterable[int] | None = None) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The records of the edited tensors and heads, of all edited layers or of these."""
        edits = [e for e in self.manifest["edits"] if layers is None or e["layer"] in layers]
        return [(edit, head) for edit in edits for head in edit["heads"]]

    def rows(self, name: str, head: int, *, after: bool = False) -> Weight:
        d_head = self.manifest["model"]["head_dim"]
        tensor = (self.after if after else self.before)[name]
        return Weight(tensor[head * d_head : (head + 1) * d_head])

    def key_head(self, head: int) -> int:
        model = self.manifest["model"]
        return head // (model["num_attention_heads"] // model["num_key_value_heads"])


def apply(run: Run, source: Path, out: Path, edit: Edit, *flags: object) -> Outcome:
    result = run("apply", source, "-o", out, "--device", "cpu", *edit.flags(), *flags)
    assert result.exit_code == 0, result.output
    return Outcome(read(source), read(out), json.loads((out / "qkpatch.json").read_text()))


def distance(
    outcome: Outcome, record: Mapping[str, Any], head: Mapping[str, Any], edit: Edit, key: int
) -> int:
    """ULPs between the stored head and the oracle's, were ``key`` its key head."""
    q, k = outcome.rows(record["tensor"], head["head"]), outcome.rows(record["key_tensor"], key)
    expected = oracle.round_to(edit.expected(q, k, head["modes"]).W_Q, record["dtype"])
    return oracle.ulps(
        outcome.rows(record["tensor"], head["head"], after=True).array, expected, record["dtype"]
    )


def check_weights(outcome: Outcome, edit: Edit, layers: Iterable[int], heads: Iterable[int]) -> None:
    """Edited heads are within one ULP of the oracle and moved; everything else has the same bytes."""
    layers, heads = tuple(layers), tuple(heads)
    assert [(e["layer"], h["head"]) for e, h in outcome.heads()] == [(n, h) for n in layers for h in heads]
    for record, head in outcome.heads():
        assert distance(outcome, record, head, edit, outcome.key_head(head["head"])) <= 1
        moved = outcome.rows(record["tensor"], head["head"], after=True)
        assert moved != outcome.rows(record["tensor"], head["head"])
    edited = {record["tensor"] for record in outcome.manifest["edits"]}
    assert outcome.after.keys() == outcome.before.keys()
    for name in outcome.before.keys() - edited:
        assert same_bytes(outcome.after[name], outcome.before[name]), name
    for name in edited:
        for head in set(range(outcome.manifest["model"]["num_attention_heads"])) - set(heads):
            assert outcome.rows(name, head, after=True) == outcome.rows(name, head)


def check_wrong_key_heads_fail(outcome: Outcome, edit: Edit, layers: Iterable[int]) -> None:
    """Neither ``h % n_kv_heads`` nor always the first key head would pass :func:`check_weights`."""
    n_kv_heads = outcome.manifest["model"]["num_key_value_heads"]
    for wrong_key in (lambda head: head % n_kv_heads, lambda head: 0):
        distances = [
            distance(outcome, record, head, edit, wrong_key(head["head"]))
            for record, head in outcome.heads(layers)
            if wrong_key(head["head"]) != outcome.key_head(head["head"])
        ]
        # Two key heads can ask for nearly the same shrink of one head, but not of all heads.
        assert (max if edit.select == "shrink" else min)(distances) > 1


def close(actual: Any, expected: Any, size: float = 0.0) -> bool:
    """Equal to six digits, or to nine of ``size``; both None is equal too."""
    if expected is None:
        return actual is None
    return np.shape(actual) == np.shape(expected) and np.allclose(
        actual, expected, rtol=1e-6, atol=1e-9 * size
    )


def check_manifest(outcome: Outcome, edit: Edit, layers: Iterable[int]) -> None:
    """The recorded figures of ``layers`` are those of the stored weights."""
    for record, head in outcome.heads(layers):
        key_head = outcome.key_head(head["head"])
        q, k = outcome.rows(record["tensor"], head["head"]), outcome.rows(record["key_tensor"], key_head)
        before, stored = q.array, outcome.rows(record["tensor"], head["head"], after=True).array
        dense, recorded = decompose(q, k, edit.channel), tuple(head["modes"])
        chosen = edit.chosen(dense, recorded)
        rank, count, largest = len(dense.S), len(head["values_before"]), abs(dense.S[0])
        M, M_after = before.T @ k.array, stored.T @ k.array

        assert head["kv_head"] == key_head
        assert count >= head["rank"] == rank
        if edit.select == "random":
            assert len(set(recorded) - set(range(edit.paired))) == min(edit.paired, rank - edit.paired)
        else:
            assert recorded == (() if edit.select == "shrink" else chosen)
        assert close(head["values_before"], oracle.values(before, k.array, edit.channel, count), largest)
        assert close(head["values_after"], oracle.values(stored, k.array, edit.channel, count), largest)
        assert close(head["gap"], dense.gap(chosen))
        assert close(head["frobenius_before"], np.linalg.norm(M))
        assert close(head["frobenius_after"], np.linalg.norm(M_after))
        assert close(head["relative_change"], np.linalg.norm(stored - before) / np.linalg.norm(before))
        assert close(head["realised_share"], edit.expected(q, k, recorded).realised)
        if edit.select == "shrink":  # one factor for the whole head
            gains = [np.sum(stored * before) / np.sum(before**2)]
        else:
            gains = oracle.gains(dense, recorded, M_after, edit.channel)
        assert close(head["gains"], gains, 1.0)


@pytest.mark.parametrize(
    "edit", [Edit(*numbers) for numbers in EDITS], ids=lambda e: f"{e.channel}-{e.select}-{e.alpha}"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_heads_and_recorded_figures_are_those_of_the_dense_oracle(
    shape: str, dtype: str, edit: Edit, tmp_path: Path, run: Run
) -> None:
    tiny = build_tiny(tmp_path / "in", dtype=DTYPES[dtype], seed=len(shape), **SHAPES[shape])
    heads = range(tiny.n_heads - 1)
    outcome = apply(
        run, tiny.path, tmp_path / "out", edit, "--layers", "0,2", "--heads", f"0-{tiny.n_heads - 2}"
    )
    check_weights(outcome, edit, (0, 2), heads)
    check_manifest(outcome, edit, (0, 2))
    if "GQA" in shape:
        check_wrong_key_heads_fail(outcome, edit, (0, 2))


def test_a_stored_subspace_edit_is_a_projection_inside_the_row_space_of_the_query(
    tmp_path: Path, run: Run
) -> None:
    tiny = build_tiny(tmp_path / "in", dtype=torch.float32)
    outcome = apply(run, tiny.path, tmp_path / "out", Edit("full", "subspace", 3, 0.25))
    for record, head in outcome.heads():
        before, stored = (
            outcome.rows(record["tensor"], head["head"], after=after).array for after in (False, True)
        )
        projector = oracle.pinv(before) @ (before - stored) / 0.75  # G Gᵀ
        assert np.allclose(projector, projector.T, atol=1e-5)
        assert np.allclose(projector @ projector, projector, atol=1e-5)
        assert np.trace(projector) == pytest.approx(3, abs=1e-5)
        assert head["gains"] == pytest.approx([0.25] * 3, abs=1e-6)


def test_what_a_head_draws_depends_on_the_seed_and_the_head_alone(tmp_path: Path, run: Run) -> None:
    tiny = build_tiny(tmp_path / "in", d_head=40, d_model=48)  # 7,770 ways to draw 3 modes

    def draws(name: str, *flags: object) -> dict[tuple[int, int], tuple[int, ...]]:
        outcome = apply(run, tiny.path, tmp_path / name, Edit("full", "random", 3, 0.5), *flags)
        return {(edit["layer"], head["head"]): tuple(head["modes"]) for edit, head in outcome.heads()}

    everywhere = draws("all", "--layers", "0-2", "--seed", 5)
    assert len(set(everywhere.values())) == len(everywhere) == 12
    assert draws("some", "--layers", "1,2", "--heads", "1,3", "--seed", 5).items() <= everywhere.items()
    other = draws("other", "--layers", "0-2", "--seed", 6)
    assert not set(other.values()) & set(everywhere.values())


@pytest.mark.fixtures
@pytest.mark.parametrize(
    ("edit", "layers"),
    [
        pytest.param(Edit("full", "dominant", 4, 0.5), range(10, 19), marks=pytest.mark.long),
        pytest.param(Edit("full", "dominant", 4, 0.0), range(10, 19), marks=pytest.mark.long),
        (Edit("symmetric", "dominant", 4, 0.5), range(11, 13)),
        pytest.param(Edit("antisymmetric", "dominant", 3, 0.5), range(12, 13), marks=pytest.mark.long),
    ],
    ids=lambda value: f"{value.channel}-{value.alpha}" if isinstance(value, Edit) else None,
)
def test_a_vlm_on_disk_is_edited_as_the_dense_oracle_says_and_its_vision_tower_is_not(
    edit: Edit, layers: range, smolvlm: Path, tmp_path: Path, run: Run
) -> None:
    outcome = apply(run, smolvlm, tmp_path / "out", edit, "--layers", f"{layers[0]}-{layers[-1]}")
    check_weights(outcome, edit, layers, range(9))
    check_manifest(outcome, edit, layers[:1])
    check_wrong_key_heads_fail(outcome, edit, layers[:1])
    decoys = [name for name in outcome.before if "vision_model" in name and "self_attn.q_proj" in name]
    assert (
        len(decoys) == 24
    )  # a weight and a bias in each of 12 layers, some of the edited numbers among them
    for name in decoys:
        assert same_bytes(outcome.after[name], outcome.before[name])


@pytest.mark.fixtures
@pytest.mark.parametrize(
    ("fixture", "model_class"),
    [
        ("smollm2", "AutoModelForCausalLM"),
        pytest.param("smolvlm", "SmolVLMForConditionalGeneration", marks=pytest.mark.long),
    ],
)
def test_the_patched_directory_computes_what_the_source_does_with_the_oracles_queries(
    fixture: str,
    model_class: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, edit = request.getfixturevalue(fixture), Edit("full", "dominant", 4, 0.5)
    outcome = apply(run, source, tmp_path / "out", edit, "--layers", "10-18")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")

    def load(path: Path) -> torch.nn.Module:
        model, info = getattr(transformers, model_class).from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval()

    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("The capital of France is Paris, and the Eiffel tower stands", return_tensors="pt")

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model(**prompt).logits

    model = load(source)
    unpatched = logits(model)
    parameters = dict(model.named_parameters())
    for record, head in outcome.heads():
        q = outcome.rows(record["tensor"], head["head"])
        k = outcome.rows(record["key_tensor"], outcome.key_head(head["head"]))
        rows = oracle.round_to(edit.expected(q, k, head["modes"]).W_Q, record["dtype"])
        first = head["head"] * len(rows)
        parameters[record["tensor"]].data[first : first + len(rows)] = torch.from_numpy(rows).float()
    expected = logits(model)
    patched = logits(load(tmp_path / "out"))

    assert torch.allclose(patched, expected, rtol=1e-4, atol=1e-4)
    assert (unpatched - expected).abs().max() > 1
