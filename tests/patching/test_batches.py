"""Heads that are computed together, as on CUDA, are what they are one by one: the same bytes and figures."""

from __future__ import annotations

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import test_fold_norm
import test_fp8
import test_norms
import torch
from conftest import build_tiny
from pretended_card import CARD, Card
from safetensors.torch import load_file, save_file
from typer.testing import Result

from qkpatch.errors import UsageError
from qkpatch.patching import device, spectra
from qkpatch.patching import edit_heads as editing
from qkpatch.spectral.factors import Factor
from qkpatch.spectral.product import QKProduct
from qkpatch.spectral.rule import Channel, Select

RULES = [(c.value, s.value) for c in Channel for s in Select if s is not Select.subspace or c is Channel.full]
every_rule = pytest.mark.parametrize(("channel", "select"), RULES)
KEY_HEADS = {"MHA": 5, "GQA": 3, "MQA": 1}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """Set how many heads are computed at once."""

    def choose(n: int) -> None:
        for module in (editing, spectra):
            monkeypatch.setattr(module, "heads_together", lambda *_: n)

    return choose


def numbers(value: object) -> list[float]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def same(run, together, source: Path, *flags: object, sizes: tuple[int, ...] = (1, 2, 16)) -> dict[str, Any]:
    """Edit with several batch sizes, compare files and manifests, return the manifest."""
    found = []
    for n in sizes:
        together(n)
        out = source.parent / f"{source.name}-{n}"
        result: Result = run("apply", source, *flags, "--device", "cpu", "--threads", 1, "-o", out)
        assert result.exit_code == 0, result.output
        manifest = json.loads((out / "qkpatch.json").read_text())
        del manifest["run"]
        found.append(({p.name: p.read_bytes() for p in out.glob("*.safetensors")}, manifest))
    for files, manifest in found:
        assert files == found[0][0]
        assert manifest.keys() == found[0][1].keys()
        # Values that are zero are so up to rounding.
        assert numbers(manifest) == pytest.approx(numbers(found[0][1]), rel=1e-9, abs=1e-14)
    assert found[0][0] != {p.name: p.read_bytes() for p in source.glob("*.safetensors")}
    return found[0][1]


@every_rule
@pytest.mark.parametrize("shape", KEY_HEADS)
def test_every_rule_gives_the_same_bytes(
    shape: str, channel: str, select: str, together, run, tmp_path: Path
) -> None:
    n_heads = 6 if shape == "GQA" else 5
    tiny = build_tiny(tmp_path / "source", n_heads=n_heads, n_kv_heads=KEY_HEADS[shape], dtype=torch.float16)
    flags = ("--layers", 1, "--modes", 3, "--alpha", 0.25, "--channel", channel, "--select", select)
    manifest = same(run, together, tiny.path, *flags)
    assert len(manifest["edits"][0]["heads"]) == n_heads


@pytest.mark.parametrize("heads", ["0", "1-3,5", "0,2,4"])
@pytest.mark.parametrize("channel", ["full", "symmetric"])
def test_some_heads_give_the_same_bytes(heads: str, channel: str, together, run, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "source", n_heads=6, n_kv_heads=3, d_head=12, d_model=10)
    same(run, together, tiny.path, "--layers", "0,2", "--heads", heads, "--modes", 2, "--channel", channel)


@pytest.mark.parametrize("name", test_norms.CASES)
@pytest.mark.parametrize("channel", ["full", "antisymmetric"])
def test_norms_of_queries_and_keys_give_the_same_bytes(
    name: str, channel: str, together, run, tmp_path: Path
) -> None:
    source = test_norms.build(tmp_path / "source", test_norms.CASES[name])
    recipe = ("--recipe", tmp_path / "probe.yaml")
    same(run, together, source, *recipe, "--layers", 1, "--modes", 2, "--channel", channel, sizes=(1, 3))


@pytest.mark.parametrize("family", test_fold_norm.FAMILIES)
@pytest.mark.parametrize(
    ("channel", "select"), [("full", "dominant"), ("full", "shrink"), ("symmetric", "bottom")]
)
def test_a_folded_norm_gives_the_same_bytes(
    family: str, channel: str, select: str, together, run, tmp_path: Path
) -> None:
    source = test_fold_norm.build(tmp_path / "source", family)
    flags = ("--layers", 1, "--modes", 2, "--channel", channel, "--select", select)
    same(run, together, source, *flags, "--fold-norm", sizes=(1, 3))


@pytest.mark.parametrize("scales", [torch.float32, torch.uint8], ids=["F32", "F8_E8M0"])
@pytest.mark.parametrize(
    ("channel", "select"), [("full", "dominant"), ("full", "subspace"), ("symmetric", "random")]
)
def test_block_fp8_gives_the_same_bytes(
    scales: torch.dtype, channel: str, select: str, together, run, tmp_path: Path
) -> None:
    test_fp8.build(tmp_path / "source", scales)
    flags = ("--layers", "0-1", "--modes", 2, "--alpha", 0, "--channel", channel, "--select", select)
    same(run, together, tmp_path / "source", *flags, sizes=(1, 3))


def rewrite(path: Path, name: str, rows: slice, value: float) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors[name][rows] = value
    save_file(tensors, file, {"format": "pt"})


@every_rule
def test_heads_of_other_ranks_do_not_disturb_each_other(
    channel: str, select: str, together, run, tmp_path: Path
) -> None:
    """Heads with fewer modes than are asked for, and one without any, among whole ones."""
    tiny = build_tiny(tmp_path / "source", n_heads=4, n_kv_heads=4)
    rewrite(tiny.path, tiny.name(1, "q"), slice(8, 14), 0)  # rank 2 of 8
    rewrite(tiny.path, tiny.name(1, "k"), slice(16, 24), 0)  # no product
    flags = ("--layers", 1, "--modes", 4, "--channel", channel, "--select", select)
    heads = same(run, together, tiny.path, *flags)["edits"][0]["heads"]
    assert [head["rank"] for head in heads][2] == 0
    if select == "dominant" and channel == "full":
        assert [len(head["modes"]) for head in heads] == [4, 2, 0, 4]
        assert [len(head["gains"]) for head in heads] == [4, 2, 0, 4]


def test_spectra_are_the_same(together, run, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "source", n_heads=6, n_kv_heads=3)
    found = []
    for n in (1, 4, 16):
        together(n)
        found.append(json.loads(run("inspect", tiny.path, "--modes", 2, "--json").stdout))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize(("which", "rows"), [("q", slice(16, 24)), ("k", slice(8, 16))])
def test_what_is_wrong_with_one_of_them_names_it(
    which: str, rows: slice, size: int, together, run, tmp_path: Path
) -> None:
    tiny = build_tiny(tmp_path / "source")
    rewrite(tiny.path, tiny.name(1, which), rows, torch.nan)
    together(size)
    result = run("apply", tiny.path, "--layers", 1, "--modes", 2, "-o", tmp_path / "out")
    assert result.exit_code == 3
    name = {"q": "query head 2", "k": "key head 1"}[which]
    assert f"{name} of layer 1 holds NaN or Inf" in result.output


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_shrink_that_is_none_names_its_head(size: int, together, run, tmp_path: Path) -> None:
    tiny = build_tiny(tmp_path / "source", n_heads=4, n_kv_heads=4, dtype=torch.float32)
    file = tiny.path / "model.safetensors"
    tensors = load_file(file)
    keys = tensors[tiny.name(1, "k")]
    keys[16] = (
        keys[17] * (1 + 1e-5) + 1e-6 * keys[16]
    )  # keys that reach part of a change only by a huge query
    save_file(tensors, file, {"format": "pt"})
    together(size)
    flags = ("--layers", 1, "--modes", 4, "--alpha", 0, "--channel", "symmetric", "--select", "shrink")
    result = run("apply", tiny.path, *flags, "-o", tmp_path / "out")
    assert result.exit_code == 3
    assert "head 2 of" in result.output


def test_heads_that_share_keys_share_their_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, geqrf = [], torch.geqrf
    monkeypatch.setattr(torch, "geqrf", lambda A: counted.append(len(A)) or geqrf(A))
    W_Q, W_K = torch.randn(6, 4, 10).double(), torch.randn(2, 4, 10).double()
    shared = QKProduct(Factor(W_Q), Factor(W_K).take([0, 0, 0, 1, 1, 1]))
    found = shared.spectra(Channel.full)
    assert sorted(counted) == [2, 6]
    alone = [
        QKProduct(Factor(W_Q[i : i + 1]), Factor(W_K[i // 3][None])).spectra(Channel.full)[0]
        for i in range(6)
    ]
    assert all(torch.equal(a.S, b.S) for a, b in zip(found, alone, strict=True))


class TestHowMany:
    """``heads_together``: the card's free memory is shared among threads, and half of it stays free."""

    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch):
        return lambda n: monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (n, 80 << 30))

    def test_one_by_one_on_a_cpu(self) -> None:
        assert device.heads_together(torch.device("cpu"), 1, 1) == 1

    @pytest.mark.parametrize(
        ("memory", "threads", "expected"),
        [(80 << 30, 1, device.MOST_TOGETHER), (1600, 1, 8), (1600, 2, 4), (1600, 99, 1), (0, 1, 1)],
    )
    def test_as_many_as_fit_on_cuda(self, memory: int, threads: int, expected: int, free) -> None:
        free(memory)
        assert device.heads_together(torch.device("cuda"), 100, threads) == expected


class TestOwnStream:
    """``computing`` with a card that is not there."""

    @pytest.fixture
    def streams(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
        made: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "Stream", lambda where: made.append(where) or len(made))
        monkeypatch.setattr(torch.cuda, "stream", nullcontext)
        monkeypatch.setattr(device, "_OF_THREAD", threading.local())
        return made

    def test_each_thread_has_one_and_keeps_it(self, streams: list[torch.device]) -> None:
        card, both = torch.device("cuda:1"), threading.Barrier(2)

        def work() -> int:
            both.wait()
            for _ in range(3):
                with device.computing(card):
                    pass
            return device._OF_THREAD.stream

        with ThreadPoolExecutor(2) as pool:
            found = [pool.submit(work) for _ in range(2)]
            assert sorted(one.result() for one in found) == [1, 2]
        assert streams == [card, card]

    def test_a_cpu_has_none(self, streams: list[torch.device]) -> None:
        with device.computing(torch.device("cpu")):
            pass
        assert not streams

    def test_a_full_card_is_told(self, streams: list[torch.device]) -> None:
        with pytest.raises(UsageError) as told, device.computing(torch.device("cuda")):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        assert told.value.where == "--device"
        assert "has no memory left for a few heads" in told.value.what


class TestACard:
    """All that is done to tensors on a card can be done there, and none of it mixes them with the host's."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        """``--device cuda`` is a pretended one, three heads at a time; what runs on it."""
        calls: Counter[str] = Counter()
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        for module in (device, editing):
            monkeypatch.setattr(
                module, "choose_device", lambda name: CARD if name == "cuda" else torch.device(name)
            )
        for module in (editing, spectra):
            monkeypatch.setattr(module, "heads_together", lambda where, *_: 3 if where == CARD else 1)
            monkeypatch.setattr(
                module, "computing", lambda where: Card(calls) if where == CARD else nullcontext()
            )
        return calls

    def both(self, run, source: Path, *flags: object) -> dict[str, Any]:
        found = []
        for name in ("cpu", "cuda"):
            out = source.parent / name
            result = run("apply", source, *flags, "--device", name, "-o", out)
            assert result.exit_code == 0, result.output or result.exception
            manifest = json.loads((out / "qkpatch.json").read_text())
            found.append(({p.name: p.read_bytes() for p in out.glob("*.safetensors")}, manifest))
        assert found[0][0] == found[1][0] != {p.name: p.read_bytes() for p in source.glob("*.safetensors")}
        figures = [numbers(manifest["edits"]) for _, manifest in found]
        assert figures[1] == pytest.approx(figures[0], rel=1e-9, abs=1e-14)
        return found[1][1]

    @pytest.mark.long
    @every_rule
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
    def test_every_rule(
        self, channel: str, select: str, dtype: torch.dtype, calls: Counter[str], run, tmp_path: Path
    ) -> None:
        tiny = build_tiny(tmp_path / "source", dtype=dtype)
        flags = ("--layers", "0-1", "--modes", 2, "--channel", channel, "--select", select)
        assert self.both(run, tiny.path, *flags)["compute"]["device"].startswith("cuda")
        # Of both layers the queries, the keys and the queries as stored, in two batches.
        assert calls["geqrf" if dtype is torch.float64 else "bmm"] >= 3 * 2 * 2
        assert not calls.keys() & {"_linalg_svd", "_linalg_eigh"}

    @pytest.mark.parametrize("name", test_norms.CASES)
    def test_norms(self, name: str, calls: Counter[str], run, tmp_path: Path) -> None:
        source = test_norms.build(tmp_path / "source", test_norms.CASES[name])
        self.both(run, source, "--recipe", tmp_path / "probe.yaml", "--layers", 1, "--modes", 2)
        assert calls["bmm"] >= 4

    @every_rule
    def test_a_folded_norm(self, channel: str, select: str, calls: Counter[str], run, tmp_path: Path) -> None:
        source = test_fold_norm.build(tmp_path / "source", "gemma3-text")
        flags = ("--layers", 1, "--modes", 2, "--channel", channel, "--select", select)
        self.both(run, source, *flags, "--fold-norm")
        assert calls["bmm"] >= 4

    @pytest.mark.parametrize("scales", [torch.float32, torch.uint8], ids=["F32", "F8_E8M0"])
    def test_block_fp8(self, scales: torch.dtype, calls: Counter[str], run, tmp_path: Path) -> None:
        test_fp8.build(tmp_path / "source", scales)
        self.both(run, tmp_path / "source", "--layers", "0-1", "--modes", 2, "--alpha", 0)
        assert calls["bmm"] >= 4

    def test_heads_that_are_factored_in_either_way(self, calls: Counter[str]) -> None:
        W = torch.randn(4, 5, 12).double()
        W[2, 1] = W[2, 0]
        with Card(calls):
            factor = Factor(W.to(CARD), 2.0**-8)
            taken = factor.take([2, 0])
            lifted, also = factor.basis.lift(factor.R).cpu(), taken.basis.lift(taken.R).cpu()
        assert factor._factors[2] == [2]
        assert torch.allclose(lifted, W.mT, atol=1e-12)
        assert torch.allclose(also, W[[2, 0]].mT, atol=1e-12)

    def test_spectra(self, calls: Counter[str], run, tmp_path: Path) -> None:
        tiny = build_tiny(tmp_path / "source")
        on_cpu, on_card = (
            json.loads(run("inspect", tiny.path, "--modes", 2, "--json", "--device", name).stdout)
            for name in ("cpu", "cuda")
        )
        assert numbers(on_card) == pytest.approx(numbers(on_cpu), rel=1e-12, abs=1e-14)
        assert calls["bmm"] >= 4

    def test_a_nan_is_found_there(self, calls: Counter[str], run, tmp_path: Path) -> None:
        tiny = build_tiny(tmp_path / "source")
        rewrite(tiny.path, tiny.name(1, "q"), slice(16, 24), torch.nan)
        flags = ("--layers", 1, "--modes", 2, "--device", "cuda")
        assert "query head 2" in run("apply", tiny.path, *flags, "-o", tmp_path / "out").output

    def test_mixing_would_be_noticed(self, calls: Counter[str]) -> None:
        with Card(calls):
            on_card = torch.ones(3).to(CARD)
            assert on_card.device == CARD
            with pytest.raises(RuntimeError, match="on the card and on the host"):
                on_card + torch.ones(3)
