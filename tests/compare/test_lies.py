"""What an attacker would write into OUT or its manifest, digests made to match: `verify` believes none of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Tiny, build_tiny
from safetensors.torch import load_file, save_file

from qkpatch import api
from qkpatch.common.observer import Unseen
from qkpatch.errors import FileSystemError

Run = Callable[..., Any]
Manifest = dict[str, Any]
SHARD = "model.safetensors"


@dataclass(frozen=True)
class Made:
    """An output of some flags, and how to make another."""

    out: Path
    source: Tiny
    apply: Callable[..., Path]

    @property
    def manifest(self) -> Manifest:
        document: Manifest = json.loads((self.out / "qkpatch.json").read_bytes())
        return document

    def write(self, manifest: Manifest) -> None:
        """Put a manifest there, in canonical form or not: nothing says that it must be."""
        (self.out / "qkpatch.json").write_text(json.dumps(manifest))

    def say(self, change: Callable[[Manifest], object]) -> None:
        manifest = self.manifest
        change(manifest)
        self.write(manifest)

    def store(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change tensors of OUT, and let every digest say so."""
        tensors = load_file(self.out / SHARD)
        change(tensors)
        save_file(tensors, self.out / SHARD, {"format": "pt"})
        self.rehash()

    def rehash(self) -> None:
        """Make every digest that is on record true of what lies there."""
        manifest, raw = self.manifest, (self.out / SHARD).read_bytes()
        for edit in manifest["edits"]:
            if edit["sha256_after"] is not None:
                begin, end = edit["byte_range"]
                edit["sha256_after"] = hashlib.sha256(raw[begin:end]).hexdigest()
        for file in manifest["files"]:
            if file["sha256"] is not None:
                file["sha256"] = digest(self.out / file["name"])
        self.write(manifest)
        self.resum()

    def resum(self) -> None:
        if (self.out / "SHA256SUMS").exists():
            names = sorted([*(file["name"] for file in self.manifest["files"]), "qkpatch.json"])
            lines = [f"{digest(self.out / name)}  {name}\n" for name in names]
            (self.out / "SHA256SUMS").write_text("".join(lines))

    def q(self, layer: int) -> str:
        return self.source.name(layer, "q")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(made: Made, layer: int = 1, head: int = 0) -> None:
    """One bit of one number of a planned row."""
    at = made.manifest["edits"][layer - 1]["byte_range"][0] + head * 8 * 24 * 2 + 6
    raw = bytearray((made.out / SHARD).read_bytes())
    raw[at] ^= 1
    (made.out / SHARD).write_bytes(raw)
    made.rehash()


def fill(made: Made, value: float) -> None:
    made.store(lambda t: t[made.q(1)][:8].fill_(value))


def undo_head(made: Made) -> None:
    """Its records stay: the other heads still differ from SOURCE."""
    before = load_file(made.source.path / SHARD)[made.q(1)]
    made.store(lambda t: t[made.q(1)][8:16].copy_(before[8:16]))


def exchange(made: Made, one: slice, other: slice) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        a, b = tensors[made.q(1)][one].clone(), tensors[made.q(1)][other].clone()
        tensors[made.q(1)][one], tensors[made.q(1)][other] = b, a

    made.store(change)


def swap_tensors(made: Made) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[made.q(1)], tensors[made.q(2)] = tensors[made.q(2)].clone(), tensors[made.q(1)].clone()

    made.store(change)


def graft(made: Made, *flags: str) -> None:
    """The weights, digests and figures of another edit under this one's settings."""
    other = made.apply("other", *flags)
    theirs = json.loads((other / "qkpatch.json").read_bytes())
    shutil.copy(other / SHARD, made.out / SHARD)
    made.say(lambda m: m.update(edits=theirs["edits"], warnings=theirs["warnings"]))
    made.rehash()


def edit(**keys: Any) -> Callable[[Made], None]:
    return lambda made: made.say(lambda m: m["edit"].update(keys))


def figure(key: str, change: Callable[[Any], Any]) -> Callable[[Made], None]:
    def lie(manifest: Manifest) -> None:
        head = manifest["edits"][0]["heads"][0]
        head[key] = change(head[key])

    return lambda made: made.say(lie)


def block(which: str, **keys: Any) -> Callable[[Made], None]:
    return lambda made: made.say(lambda m: m[which].update(keys))


def digests(*keys: str, edits: slice = slice(None)) -> Callable[[Made], None]:
    """Digests forgotten."""
    return lambda made: made.say(lambda m: [e.update(dict.fromkeys(keys)) for e in m["edits"][edits]])


def files(change: Callable[[list[Manifest]], object]) -> Callable[[Made], None]:
    def lie(made: Made) -> None:
        made.say(lambda m: change(m["files"]))
        made.resum()

    return lie


def forget_files(made: Made) -> None:
    (made.out / "SHA256SUMS").unlink()
    made.say(lambda m: [file.update(sha256=None) for file in m["files"]])


def untouched(made: Made) -> None:
    made.store(lambda t: t[made.source.name(0, "v")].view(torch.int16)[0, 0].bitwise_xor_(1))


BOTH = ("--layers", "1,2")
RANDOM, FILES = (*BOTH, "--select", "random", "--modes", "2", "--seed", "3"), (*BOTH, "--digest", "files")
ANTI = (*BOTH, "--channel", "antisymmetric")

# What it is: the flags of the honest output, and the lie.
LIES: dict[str, tuple[tuple[str, ...], Callable[[Made], object]]] = {
    "one bit of a planned row": (BOTH, flip),
    "one bit of the last planned row": (BOTH, lambda made: flip(made, layer=2, head=3)),
    "one bit, all files hashed": (FILES, flip),
    "one bit, nothing hashed": ((*BOTH, "--digest", "none"), flip),
    "rows of NaN": (BOTH, lambda made: fill(made, float("nan"))),
    "rows of Inf": (BOTH, lambda made: fill(made, float("inf"))),
    "rows of zeros": (BOTH, lambda made: fill(made, 0.0)),
    "a head that was not edited": (BOTH, undo_head),
    "two heads exchanged": (BOTH, lambda made: exchange(made, slice(0, 8), slice(8, 16))),
    "two rows exchanged": (BOTH, lambda made: exchange(made, slice(0, 1), slice(1, 2))),
    "two tensors exchanged": (BOTH, swap_tensors),
    "weights of another alpha": (BOTH, lambda made: graft(made, *BOTH, "--alpha", "0.5")),
    "weights of another seed": (RANDOM, lambda made: graft(made, *RANDOM[:-1], "4")),
    "another alpha": (BOTH, edit(alpha=0.5)),
    "nearly the same alpha": (BOTH, edit(alpha=0.8 + 1e-3)),
    "another seed": (RANDOM, edit(seed=4)),
    "another channel": (BOTH, edit(channel="symmetric")),
    "another number of modes": (BOTH, edit(modes=3, modes_edited=3)),
    "an odd number of paired modes": (ANTI, edit(modes=3)),
    "another selection": (BOTH, edit(select="bottom")),
    "other layers": (BOTH, edit(layers=[0, 1])),
    "a layer left out, with its record": (
        BOTH, lambda made: made.say(lambda m: (m["edit"].update(layers=[1]), m["edits"].pop())),
    ),
    "a head left out, with its records": (
        BOTH,
        lambda made: made.say(
            lambda m: (m["edit"].update(heads=[0, 1, 2]), [e["heads"].pop() for e in m["edits"]])
        ),
    ),
    "a gain folded": (BOTH, edit(fold_norm=True)),
    "settings that the recipe gave": ((*BOTH, "--modes", "3"), edit(from_recipe=["modes"])),
    "no digest of any edit": (BOTH, digests("sha256_before", "sha256_after")),
    "no digest of one edit": (BOTH, digests("sha256_before", "sha256_after", edits=slice(1))),
    "no digest before": (BOTH, digests("sha256_before")),
    "no digest after": (BOTH, digests("sha256_after")),
    "no digest of any file": (FILES, forget_files),
    "no digest of one file": (FILES, files(lambda some: some[0].update(sha256=None))),
    "another figure of the spectrum before": (BOTH, figure("values_before", lambda v: [v[0] * 1.01, *v[1:]])),
    "another figure of the spectrum after": (BOTH, figure("values_after", lambda v: [*v[:-1], v[-1] + 0.01])),
    "a shorter spectrum": (BOTH, figure("values_after", lambda v: v[:-1])),
    "another gap": (BOTH, figure("gap", lambda v: v / 2)),
    "no gap": (BOTH, figure("gap", lambda _: None)),
    "another norm before": (BOTH, figure("frobenius_before", lambda v: v * 1.001)),
    "another norm after": (BOTH, figure("frobenius_after", lambda v: v * 1.001)),
    "another size of the change": (BOTH, figure("relative_change", lambda v: v / 10)),
    "another rounding error": (BOTH, figure("rounding_error", lambda _: 0)),
    "other gains": (BOTH, figure("gains", lambda v: [1.0] * len(v))),
    "another rank": (BOTH, figure("rank", lambda v: v - 1)),
    "other modes of a head": (BOTH, figure("modes", lambda v: [*v[:-1], v[-1] + 1])),
    "a share that no such edit has": (BOTH, figure("realised_share", lambda _: 1.0)),
    "an untouched tensor, hashed": (FILES, untouched),
    "an untouched file, hashed": (
        FILES, lambda made: ((made.out / "tokenizer.json").write_text("[]"), made.rehash()),
    ),
    "a size": (BOTH, files(lambda some: some[0].update(size=1))),
    "one more file on record": (BOTH, files(lambda some: some.append({**some[0], "name": "nothing.json"}))),
    "one file less on record": (BOTH, files(lambda some: some.pop())),
    "one more edit": (BOTH, lambda made: made.say(lambda m: m["edits"].append({**m["edits"][0], "tensor": "x"}))),
    "one edit less": (BOTH, lambda made: made.say(lambda m: m["edits"].pop())),
    "a warning left out": ((*BOTH, "--modes", "8"), lambda made: made.say(lambda m: m.update(warnings=[]))),
    "another stack than torch's": (BOTH, lambda made: made.say(lambda m: m["run"]["stack"].update(torch="1.0"))),
    "another torch than the stack's": (BOTH, block("tool", torch="1.0")),
    "a run that ended before it began": (BOTH, block("run", finished="1999-01-01T00:00:00+00:00")),
    "another number of files copied": (BOTH, block("run", copied_by={"none": 99})),
    "files that came by what there is not": (
        BOTH, lambda made: made.say(lambda m: m["run"].update(copied_by={"teleport": len(m["files"])})),
    ),
    "less than no files": (
        BOTH, lambda made: made.say(lambda m: m["run"].update(copied_by={"none": len(m["files"]) + 1, "direct": -1})),
    ),
    "another tool": (BOTH, block("tool", name="other")),
    "arithmetic that there is none of": (BOTH, block("compute", dtype="float32")),
    "a commit of what is no repository": (BOTH, block("source", commit="0" * 40)),
    "a check of what is no repository": (BOTH, block("source", checked=True)),
    "another recipe": (BOTH, block("recipe", name="qwen3")),
    "another family by the same recipe": (BOTH, block("recipe", title="Qwen")),
    "a recipe tested on what it was not": (BOTH, block("recipe", tested="everything")),
    "a device that there is none of": (BOTH, block("compute", device="tpu")),
    "a time that is none": (BOTH, block("run", finished="tomorrow")),
    "defaults that no recipe has": (BOTH, edit(from_recipe=["alpha"])),
    "another digest of SOURCE's file": (FILES, files(lambda some: some[0].update(source_sha256="0" * 64))),
}  # fmt: skip
QUICK = {
    "one bit of a planned row", "rows of NaN", "another alpha", "no digest of any edit", "another gap",
    "two tensors exchanged", "an untouched tensor, hashed", "another stack than torch's", "a size",
}  # fmt: skip


@pytest.mark.parametrize(
    "lie", [pytest.param(k, marks=() if k in QUICK else pytest.mark.stress) for k in LIES]
)
def test_a_lie_is_not_believed(tmp_path: Path, run: Run, lie: str) -> None:
    flags, tell = LIES[lie]
    source = build_tiny(tmp_path / "source")
    if lie == "a warning left out":  # two modes of equal size at the cut are warned of
        flags = (*BOTH, "--modes", "4")
        level(source)

    def apply(name: str, *flags: str) -> Path:
        assert run("apply", source.path, "-o", tmp_path / name, *flags).exit_code == 0
        return tmp_path / name

    made = Made(apply("out", *flags), source, apply)
    honest = run("verify", made.out, "--source", source.path)
    assert honest.exit_code == 0, honest.output
    tell(made)
    result = run("verify", made.out, "--source", source.path)
    assert result.exit_code in (1, 3), result.output
    assert isinstance(result.exception, SystemExit)


def level(source: Tiny) -> None:
    """Give every product modes of one size: a cut among them is arbitrary."""
    tensors = load_file(source.path / SHARD)
    for layer in (1, 2):
        for which, heads in (("q", source.n_heads), ("k", source.n_kv_heads)):
            rows = torch.eye(source.d_head, source.d_model).repeat(heads, 1)
            tensors[source.name(layer, which)] = rows.to(torch.bfloat16)
    save_file(tensors, source.path / SHARD, {"format": "pt"})


# -------- what is true is believed, whatever OUT is like


KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "without digests": ({}, ("--digest", "none")),
    "with all digests": ({}, ("--digest", "files")),
    "resharded": ({}, ("--max-shard-size", "4KB")),
    "some heads": ({}, ("--heads", "1,3", "--layers", "0-2")),
    "random modes": ({}, ("--select", "random", "--modes", "2", "--seed", "7")),
    "bottom modes": ({}, ("--select", "bottom")),
    "a random subspace": ({}, ("--select", "subspace", "--seed", "7")),
    "shrunk": ({}, ("--select", "shrink")),
    "symmetric": ({}, ("--channel", "symmetric")),
    "antisymmetric": ({}, ("--channel", "antisymmetric")),
    "nothing edited": ({}, ("--alpha", "1")),
    "float16": ({"dtype": torch.float16}, ()),
    "float32": ({"dtype": torch.float32}, ()),
    "float64": ({"dtype": torch.float64}, ()),
    "several shards": ({"shards": [["layers.1."], [""]]}, ("--layers", "0-2")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_output_of_any_kind_is_computed_anew_to_the_last_bit(
    tmp_path: Path, run: Run, kind: str
) -> None:
    build, flags = KINDS[kind]
    source, out = build_tiny(tmp_path / "source", **build).path, tmp_path / "out"
    assert run("apply", source, "-o", out, *flags).exit_code == 0
    result = run("verify", out, "--source", source, "--json")
    assert result.exit_code == 0, result.output
    done = json.loads(result.stdout)["arithmetic"]
    if kind == "nothing edited":
        assert done is None
        return
    assert (done["stack"], done["differing_values"]) == ("same", 0)
    assert done["heads"] == (6 if kind == "some heads" else 12 if kind == "several shards" else 4)
    text = run("verify", out, "--source", source).stdout
    assert f"{done['heads']} heads computed anew: every bit the same" in text
    bare = run("verify", out, "--source", source, "--no-recompute")
    assert bare.exit_code == 0
    assert "the edit was not computed anew" in bare.stdout
    assert ("the planned rows may hold anything" in bare.stdout) == (kind == "without digests")


def test_an_edit_of_an_edit_is_computed_anew(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source").path
    for one, other in ((source, tmp_path / "a"), (tmp_path / "a", tmp_path / "b")):
        assert run("apply", one, "-o", other).exit_code == 0
        assert run("verify", other, "--source", one).exit_code == 0
    wrong = run("verify", tmp_path / "b", "--source", source)
    assert wrong.exit_code == 1
    assert wrong.stdout.count("mismatch") == 2  # it, and how many
    assert "OUT was made from the directory 'a', and this is the directory 'source'" in wrong.stdout


# -------- on another stack


def elsewhere(made: Made) -> None:
    """As if another machine had made it."""
    made.say(lambda m: m["run"]["stack"].update(cpu="s390x DEFAULT"))


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def foreign(request: pytest.FixtureRequest, tmp_path: Path, run: Run) -> Made:
    """An output that says that it was made elsewhere."""
    source = build_tiny(tmp_path / "source", dtype=request.param)

    def apply(name: str, *flags: str) -> Path:
        assert run("apply", source.path, "-o", tmp_path / name, *flags).exit_code == 0
        return tmp_path / name

    made = Made(apply("out", *BOTH), source, apply)
    elsewhere(made)
    return made


def nudge(tensor: torch.Tensor, ulps: int, every: int = 3) -> None:
    """Move some numbers of a planned row by ULPs; of float64 by so many times 2e-13 of the row's norm."""
    row = tensor[0]
    if tensor.dtype == torch.float64:
        row[:] += ulps * 2e-13 * row.norm() * torch.ones_like(row) / len(row) ** 0.5
        return
    bits = row.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
    bits[::every] += ulps


def test_elsewhere_numbers_may_be_one_ulp_apart(foreign: Made, run: Run) -> None:
    foreign.store(lambda t: nudge(t[foreign.q(1)], 1))
    result = run("verify", foreign.out, "--source", foreign.source.path)
    assert result.exit_code == 0, result.output
    assert "number(s) differ by what another stack may make of them" in result.stdout
    foreign.store(lambda t: nudge(t[foreign.q(1)], 9))
    result = run("verify", foreign.out, "--source", foreign.source.path)
    assert result.exit_code == 1
    assert "of a row's norm away" in result.stdout


def test_elsewhere_no_more_numbers_differ_than_lie_near_the_middle(foreign: Made, run: Run) -> None:
    dtype = load_file(foreign.source.path / "model.safetensors")[foreign.q(1)].dtype
    foreign.store(lambda t: nudge(t[foreign.q(1)], 1, 1))
    result = run("verify", foreign.out, "--source", foreign.source.path)
    assert result.exit_code == (0 if dtype == torch.float64 else 1)
    assert ("more than another stack rounds otherwise" in result.stdout) == (dtype != torch.float64)


@pytest.mark.stress
@pytest.mark.parametrize(
    "lie", [lie for lie in LIES if not lie.startswith(("one bit", "a warning", "another stack"))]
)
def test_a_lie_is_not_believed_of_another_stack(tmp_path: Path, run: Run, lie: str) -> None:
    """Whoever forges the stack gains an ULP, and no more."""
    flags, tell = LIES[lie]
    source = build_tiny(tmp_path / "source")

    def apply(name: str, *flags: str) -> Path:
        assert run("apply", source.path, "-o", tmp_path / name, *flags).exit_code == 0
        return tmp_path / name

    made = Made(apply("out", *flags), source, apply)
    elsewhere(made)
    made.resum()
    assert run("verify", made.out, "--source", source.path).exit_code == 0
    tell(made)
    assert run("verify", made.out, "--source", source.path).exit_code in (1, 3)


def turned(made: Made, angle: float) -> None:
    """The edit that takes another vector out of a plane of equal modes: as right as the one that was made."""
    layer, before = 1, load_file(made.source.path / SHARD)
    record = made.manifest["edits"][0]["heads"][0]
    r = len(record["modes"])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        W = before[made.source.name(layer, "q")][:8].double()
        kept = torch.zeros(8, 24, dtype=torch.float64)
        kept[:, :8] = torch.eye(8, dtype=torch.float64)
        kept[0, :2] = torch.tensor([angle, -((1 - angle**2) ** 0.5)]).double()
        kept[1, :2] = torch.tensor([(1 - angle**2) ** 0.5, angle]).double()
        U = kept[:r]
        tensors[made.q(layer)][:8] = (W - 0.2 * W @ U.T @ U).to(torch.bfloat16)

    made.store(change)


def test_a_head_whose_cut_is_arbitrary_is_compared_by_its_product(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source")
    level(source)
    out = tmp_path / "out"
    assert run("apply", source.path, "-o", out, *BOTH).exit_code == 0
    made = Made(out, source, lambda *_: out)
    result = run("verify", out, "--source", source.path)
    assert result.exit_code == 0, result.output
    assert "not reproducible elsewhere (layer.head): 1.0, 1.1, 1.2" in result.stdout
    elsewhere(made)
    turned(made, 0.6)
    result = run("verify", out, "--source", source.path)
    assert result.exit_code == 0, result.output
    made.store(lambda t: t[made.q(1)][:8].mul_(0.97))
    result = run("verify", out, "--source", source.path)
    assert result.exit_code == 1
    assert "has another product" in result.stdout


# -------- people's own, and what changes meanwhile


@pytest.mark.parametrize("digest", ["edited", "files"])
def test_a_readme_that_people_wrote_is_named(tmp_path: Path, run: Run, digest: str) -> None:
    source, out = build_tiny(tmp_path / "source").path, tmp_path / "out"
    (source / "README.md").write_text("# Base\n")
    assert run("apply", source, "-o", out, "--digest", digest).exit_code == 0
    (out / "README.md").write_text("# Mine\n")
    result = run("verify", out, "--source", source)
    assert result.exit_code == 0, result.output
    assert "README.md is neither SOURCE's nor a card of qkpatch's: somebody wrote it" in result.stdout
    assert run("apply", source, "-o", out, "--overwrite").exit_code == 2  # and is not lost
    (out / "README.md").unlink()
    assert run("verify", out, "--source", source).exit_code == 1


@pytest.mark.parametrize("side", ["OUT", "SOURCE"])
@pytest.mark.parametrize("change", ["byte", "more"])
def test_a_change_after_a_byte_was_compared_is_noticed(
    tmp_path: Path, run: Run, side: str, change: str
) -> None:
    source, out = build_tiny(tmp_path / "source").path, tmp_path / "out"
    assert run("apply", source, "-o", out).exit_code == 0
    where = {"OUT": out, "SOURCE": source}[side]

    class Late(Unseen):
        """The heads are computed when all bytes are compared."""

        def edited(self, n_heads: int) -> None:
            name = {"byte": "config.json", "more": "modeling_x.py"}[change]
            (where / name).write_bytes((source / "config.json").read_bytes() + b" ")

    with pytest.raises(FileSystemError, match=r"changed while|came into being"):
        api.verify(out, source, observer=Late())
