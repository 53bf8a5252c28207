"""Edits that are not uniform: by layer, and by energy; from the request to the proof."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracle
import pytest
import torch
import transformers
from conftest import Tiny, build_tiny
from safetensors.torch import load_file

import qkpatch
from qkpatch.common.number_ranges import format_ranges
from qkpatch.errors import QKPatchError, UsageError
from qkpatch.planning.request import Request

ABSENT = object()
LAYERS_KEYS = ("layers", "modes", "modes_edited", "alpha", "channel", "select", "energy", "min_modes")
Run = Callable[..., Any]
Item = dict[str, Any]
SCHEMA = json.loads((resources.files("qkpatch") / "planning" / "manifest.schema.json").read_text())

THREE: list[Item] = [
    {"layers": "0", "modes": 3, "alpha": 0.5},
    {"layers": "1,3", "modes": 2, "channel": "symmetric", "alpha": 0.25},
    {"layers": "2", "energy": 0.5, "min_modes": 2, "modes": 8, "channel": "antisymmetric"},
]


@pytest.fixture
def source(tmp_path: Path) -> Tiny:
    return build_tiny(tmp_path / "source", n_layers=5)


def record(out: Path) -> dict[str, Any]:
    """What of a manifest does not depend on the run, of the shape that the schema has."""
    document = json.loads((out / "qkpatch.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    document.pop("run")
    return dict(document)


def made(source: Tiny, out: Path, **edit: Any) -> dict[str, Any]:
    qkpatch.apply(qkpatch.plan(source.path, **edit), out)
    result = qkpatch.verify(out, source.path)
    assert result.ok, result.mismatches
    assert result.arithmetic is None or (result.arithmetic.stack, result.arithmetic.differing_values) == (
        "same",
        0,
    )
    return record(out)


def queries(out: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(out / "model.safetensors").items() if "q_proj" in name}


# -------- by layer


def test_a_list_that_says_the_same_for_all_layers_is_the_uniform_edit(source: Tiny, tmp_path: Path) -> None:
    uniform = made(source, tmp_path / "uniform", layers="1-4", modes=2, alpha=0.5)
    item = {"modes": 2, "alpha": 0.5}
    for name, edit in {
        "items": {"edits": [{"layers": "3-4", **item}, {"layers": [1, 2], **item}]},
        "beside": {"edits": [{"layers": 1}, {"layers": "2-4"}], **item},
        "one": {"edits": [{"layers": "1-4", **item, "channel": "full"}]},
    }.items():
        assert made(source, tmp_path / name, **edit) == uniform
        for file in ("model.safetensors", "config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "uniform" / file).read_bytes()
        assert qkpatch.plan(source.path, **edit, out=tmp_path / "uniform").is_done
        same = qkpatch.plan(source.path, layers="1-4", **item)
        assert qkpatch.plan(source.path, **edit).default_name == same.default_name


@pytest.mark.parametrize(
    "items",
    [
        THREE,
        [
            {"layers": "0-1", "select": "random", "modes": 2},
            {"layers": "2-3", "select": "subspace", "modes": 3},
        ],
        [{"layers": "0", "select": "shrink"}, {"layers": "1", "select": "bottom", "energy": 0.5}],
        [{"layers": "0-2", "alpha": 1}, {"layers": "3", "alpha": 0}],
    ],
    ids=["channels", "drawn", "controls", "one that does nothing"],
)
def test_the_layers_of_an_item_are_those_of_a_uniform_edit_to_the_last_bit(
    items: list[Item], source: Tiny, tmp_path: Path
) -> None:
    seed = {"seed": 7} if items[0].get("select") == "random" else {}
    both = made(source, tmp_path / "both", edits=items, **seed)
    before, after = queries(source.path), queries(tmp_path / "both")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for i, item in enumerate(items):
        alone = made(source, tmp_path / str(i), **item, **seed)
        weights = queries(tmp_path / str(i))
        names = {name for name in before if not torch.equal(before[name], weights[name])}
        assert bool(names) == (item.get("alpha") != 1)
        assert all(torch.equal(after[name], weights[name]) for name in names)
        moved -= names
        kept = [edit for edit in both["edits"] if edit["tensor"] in names]
        assert [{**edit, "sha256_before": 0} for edit in kept] == [
            {**e, "sha256_before": 0} for e in alone["edits"]
        ]
    assert not moved


def test_a_plan_tells_each_item_and_its_json_is_the_manifest_before_the_fact(
    source: Tiny, tmp_path: Path, run: Run
) -> None:
    config = tmp_path / "edit.yaml"
    config.write_text(
        "heads: 0,2\nalpha: 0.5\nedits:\n"
        "- {layers: 0-1, modes: 3}\n- {layers: [3], channel: symmetric, energy: 0.4, modes: 5}\n"
    )
    text = " ".join(run("plan", source.path, "--config", config).stdout.split())
    assert (
        "Edit, by layer; heads 0,2 0-1: 3 dominant modes × 0.5, full channel "
        "3: 1-5 dominant modes × 0.5, symmetric channel, as hold 0.4 of the energy" in text
    )
    planned = json.loads(run("plan", source.path, "--config", config, "--json").stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(planned)
    assert planned["edit"]["layers"] == [0, 1, 3]
    assert planned["edit"]["edits"] == [
        {"layers": [0, 1], "modes": 3, "modes_edited": 3, "alpha": 0.5, "channel": "full", "select": "dominant"},
        {
            "layers": [3], "modes": 5, "modes_edited": 5, "alpha": 0.5, "channel": "symmetric", "select": "dominant",
            "energy": 0.4, "min_modes": 1,
        },
    ]  # fmt: skip
    assert not {"modes", "alpha", "channel", "select", "energy"} & planned["edit"].keys()
    result = run("apply", source.path, "--config", config, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert record(tmp_path / "out")["edit"] == planned["edit"]
    assert run("apply", source.path, "--config", config, "-o", tmp_path / "out").exit_code == 0


def test_a_flag_holds_for_every_item_and_is_refused_where_one_says_otherwise(
    source: Tiny, tmp_path: Path, run: Run
) -> None:
    config = tmp_path / "edit.yaml"
    config.write_text("alpha: 0.5\nedits:\n- {layers: 0, modes: 3}\n- {layers: 1, channel: symmetric}\n")

    def planned(*flags: object) -> list[tuple[Any, ...]]:
        edit = json.loads(run("plan", source.path, "--config", config, "--json", *flags).stdout)["edit"]
        return [(part["modes"], part["alpha"], part["channel"]) for part in edit.get("edits", [edit])]

    assert planned() == [(3, 0.5, "full"), (4, 0.5, "symmetric")]
    assert planned("--alpha", 0.25) == [(3, 0.25, "full"), (4, 0.25, "symmetric")]
    assert planned("--channel", "symmetric") == [(3, 0.5, "symmetric"), (4, 0.5, "symmetric")]
    for flags in (("--modes", 2), ("--channel", "full"), ("--layers", "0-1")):
        result = run("plan", source.path, "--config", config, *flags)
        assert result.exit_code == 2
        assert f"{flags[0]} beside edits says otherwise" in result.stderr


WRONG = {
    "an empty list": ("edits: []", ["$.edits: it is no list of 1 to 1000 edits"]),
    "no list": ("edits: {layers: 1}", ["$.edits: expected list"]),
    "nothing": ("edits:", ["$.edits: expected list"]),
    "no mapping": ("edits: [1, {layers: 0}]", ["$.edits[0]: 1 is no mapping"]),
    "no layers": ("edits: [{modes: 2}]", ["$.edits[0].layers: missing"]),
    "an unknown key": ("edits: [{layers: 1, mode: 2}]", ["$.edits[0].mode: unknown key (did you mean modes?"]),
    "what is not by layer": ("edits: [{layers: 1, seed: 2}]", ["$.edits[0].seed"]),
    "a key without a value": ("edits: [{layers: 1, alpha: }]", ["$.edits[0].alpha: it says nothing"]),
    "a list in a list": ("edits: [{layers: 1, edits: [{layers: 2}]}]", ["$.edits[0].edits"]),
    "a layer twice": (
        "edits: [{layers: 0-2}, {layers: 4}, {layers: '2,1'}]", ["$.edits[2].layers: 1-2 named in edits[0] too"],
    ),
    "halves that do not go together": (
        "edits: [{layers: 0, select: subspace, channel: symmetric}]", ["$.edits[0]: --select subspace draws"],
    ),
    "everything": (
        "mode: 1\nseed: x\nedits:\n- {layers: 2-1, modes: many, alpha: 1e-1}\n- {layers: 4, channel: left}\n"
        "- {layers: 4, energy: 2, min_modes: 0, select: 3, alpha: .nan, 7: 8}\n",
        [
            "$.mode: unknown key", "$.seed: expected int", "$.edits[0].layers: range 2-1 is reversed",
            "$.edits[0].modes: 'many' is no int", "$.edits[0].alpha: '1e-1' is no number",
            "$.edits[1].channel: 'left' is none of them (choose one of full,", "$.edits[2].layers: 4 named in edits[1]",
            "$.edits[2].energy: 2 is not between 0 and 1 (above 0: ", "$.edits[2].min_modes: 0 is not at least 1",
            "$.edits[2].select: 3 is none of them", "$.edits[2].alpha: nan is not between", "$.edits[2].7",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_all_that_is_wrong_with_a_list_is_told_at_once(
    what: str, source: Tiny, tmp_path: Path, run: Run
) -> None:
    text, faults = WRONG[what]
    (tmp_path / "edit.yaml").write_text(text)
    result = run("apply", source.path, "--config", tmp_path / "edit.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert [fault for fault in faults if fault not in said] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        ({"edits": []}, "edits"),
        ({"edits": "0-3"}, "edits"),
        ({"edits": {"layers": 1}}, "edits"),
        ({"edits": 3}, "edits"),
        ({"edits": [{"layers": 1}, {"layers": [1, 2]}]}, "edits[1].layers"),
        ({"edits": [{"layers": 1, "mode": 2}]}, "edits[0].mode"),
        ({"edits": [{"layers": 1, "alpha": 0.5}], "alpha": 0.25}, "edits[0].alpha"),
        ({"edits": [{"layers": 1}], "layers": 2}, "edits[0].layers"),
        ({"edits": [{"layers": 1}, {"layers": 9}]}, "edits[1]"),
        ({"edits": [{"layers": 1}, {"layers": 2, "modes": 99}]}, "edits[1]"),
        ({"edits": [{"layers": 1}, {"layers": 2, "min_modes": 2}]}, "edits[1]"),
        (
            {"edits": [{"layers": 1}, {"layers": 2, "channel": "symmetric"}], "select": "subspace"},
            "--channel",
        ),
        ({"edits": [{"layers": 1}, {"layers": 2}], "seed": 3}, "--seed"),
        ({"energy": 0}, "--energy"),
        ({"energy": 1.01}, "--energy"),
        ({"energy": True}, "--energy"),
        ({"energy": float("nan")}, "--energy"),
        ({"energy": 0.5, "min_modes": 0}, "--min-modes"),
        ({"energy": 0.5, "min_modes": 3, "modes": 2}, "--min-modes"),
        ({"energy": 0.5, "min_modes": 5}, "--min-modes"),
        ({"min_modes": 2}, "--min-modes"),
        ({"energy": 0.5, "modes": 9}, "--modes"),
        ({"energy": 0.5, "modes": 5, "select": "random"}, "--modes"),
    ],
)
def test_a_wrong_value_is_an_error_object(edit: Item, where: str, source: Tiny) -> None:
    with pytest.raises(QKPatchError) as caught:
        qkpatch.plan(source.path, **edit)
    assert caught.value.exit_code == 2
    assert where in f"{caught.value.where} {caught.value.what}"


def test_a_request_made_by_hand_is_checked_too() -> None:
    with pytest.raises(UsageError, match="seed"):
        Request(edits=(Request(layers=(1,), seed=3),))
    with pytest.raises(UsageError, match="named in"):
        Request(edits=(Request(layers=(1,)), Request(layers=(1,))))
    items = Request.of(edits=[{"layers": 1, "alpha": 0}]).edits
    assert Request.of(edits=items).edits == items == (Request(layers=(1,), alpha=0),)


def test_a_short_text_takes_no_time() -> None:
    with pytest.raises(UsageError, match="named in edits"):
        Request.of(edits=[{"layers": "0-999999"}] * 1000)
    with pytest.raises(UsageError, match="no list of 1 to 1000"):
        Request.of(edits=[{"layers": i} for i in range(100_000)])


# -------- by energy

ENERGIES = [0.05, 0.3, 0.6, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_each_head_takes_as_many_modes_as_hold_the_energy(channel: str, source: Tiny, tmp_path: Path) -> None:
    tensors = load_file(source.path / "model.safetensors")
    d, counts = source.d_head, set()
    for energy in ENERGIES:
        least, most = 2, {"full": 6}.get(channel, 11)
        edit = {
            "layers": "0-4",
            "alpha": 0.5,
            "energy": energy,
            "channel": channel,
            "min_modes": least,
            "modes": most,
        }
        found = made(source, tmp_path / str(energy), **edit)
        assert found["edit"]["energy"] == energy
        for layer, head in ((e["layer"], head) for e in found["edits"] for head in e["heads"]):
            q, k = head["head"], head["kv_head"]
            W_Q = tensors[source.name(layer, "q")][q * d : (q + 1) * d].double().numpy()
            W_K = tensors[source.name(layer, "k")][k * d : (k + 1) * d].double().numpy()
            S = oracle.values(W_Q, W_K, channel, 2 * d)
            held = np.cumsum(S**2) / np.sum(S**2)
            r = min(max(int(np.argmax(held >= energy - 1e-9)) + 1, least), most)
            r += r % 2 if channel == "antisymmetric" else 0
            assert head["modes"] == list(range(r))
            counts.add(r)
    assert len(counts) > 2


@pytest.mark.parametrize("energy", [0.25, 0.5, 1.0])
def test_a_share_that_modes_hold_exactly_is_held_by_them(energy: float, tmp_path: Path) -> None:
    """Eight equal values: rounding may not decide whether two of them are a quarter."""
    source = build_tiny(tmp_path / "source", n_layers=1)
    rows = torch.eye(8, 24)
    extra = {source.name(0, "q"): rows.repeat(4, 1), source.name(0, "k"): rows.repeat(2, 1) / 3}
    tied = build_tiny(tmp_path / "tied", n_layers=1, dtype=torch.float32, extra=extra)
    found = made(tied, tmp_path / "out", layers=0, energy=energy, modes=8, alpha=0.5)
    assert {len(head["modes"]) for edit in found["edits"] for head in edit["heads"]} == {int(8 * energy)}


@pytest.mark.parametrize("channel", ["full", "symmetric", "antisymmetric"])
def test_controls_take_as_many_modes_as_the_dominant_selection(
    channel: str, source: Tiny, tmp_path: Path
) -> None:
    edit = {"layers": "0-4", "energy": 0.4, "channel": channel, "alpha": 0.5}

    def heads(select: str) -> list[dict[str, Any]]:
        more = {"seed": 3} if select in ("random", "subspace") else {}
        found = made(source, tmp_path / select, **edit, select=select, **more)
        return [head for edit in found["edits"] for head in edit["heads"]]

    dominant = heads("dominant")
    counts = [len(head["modes"]) for head in dominant]
    assert len(set(counts)) > 1
    for select in ("random", "bottom"):
        found = heads(select)
        assert [len(head["modes"]) for head in found] == counts
        assert not any({*a["modes"]} & {*b["modes"]} for a, b in zip(found, dominant, strict=True))
    shrunk = [head["relative_change"] for head in heads("shrink")]
    assert shrunk == pytest.approx([head["relative_change"] for head in dominant], rel=0.02)
    if channel == "full":
        assert [len(head["gains"]) for head in heads("subspace")] == counts


def test_heads_that_cannot_be_given_what_was_asked_for_are_named(tmp_path: Path, run: Run) -> None:
    source = build_tiny(tmp_path / "source", d_head=8, d_model=24)
    result = run(
        "apply", source.path, "-o", tmp_path / "out", "--energy", 0.9, "--modes", 2, "--layers", "0-1"
    )
    said = " ".join(result.stderr.split())
    assert (
        "as many modes as --modes allows, half of all by default, hold less than --energy asks for, in 8 head(s)"
        in said
    )
    assert "modes" in result.stdout
    assert run("verify", tmp_path / "out", "--source", source.path).exit_code == 0


def test_by_default_half_of_the_modes_is_the_most_so_that_a_random_control_is_as_large(source: Tiny) -> None:
    for channel, most in (("full", 4), ("symmetric", 8), ("antisymmetric", 8)):
        for select in ("dominant", "random"):
            edit = qkpatch.plan(source.path, energy=0.9, channel=channel, select=select).settings.block
            assert (edit.modes, edit.min_modes, edit.from_recipe) == (most, 1, ("layers",))


def test_a_file_says_energy_as_flags_do(source: Tiny, tmp_path: Path, run: Run) -> None:
    config = tmp_path / "edit.yaml"
    for text, flags in (
        ("energy: 0.25\nmin_modes: 2\nmodes: 3\n", ("--energy", 0.25, "--min-modes", 2, "--modes", 3)),
        ("energy: 1\nalpha: 0\n", ("--energy", 1, "--alpha", 0)),
        ("edits: [{layers: 1-2, energy: 1, alpha: 0}]", ("--layers", "1-2", "--energy", 1, "--alpha", 0)),
    ):
        config.write_text(text)
        told = [("--config", config), flags]
        one, other = (json.loads(run("plan", source.path, *way, "--json").stdout)["edit"] for way in told)
        assert repr(one) == repr(other)  # 0 and 0.0 are two texts
    for text in ("energy: half\n", "energy: true\n", "energy:\n", "min_modes: 1.5\n"):
        config.write_text(text)
        result = run("plan", source.path, "--config", config)
        assert result.exit_code == 2
        assert f"$.{text.partition(':')[0]}: expected" in result.stderr


def test_inspect_tells_how_many_modes_hold_the_energy(source: Tiny, run: Run) -> None:
    shown = json.loads(run("inspect", source.path, "--energy", 0.5, "--modes", 8, "--json").stdout)
    assert shown["energy"] == 0.5
    for layer in shown["layers"]:
        for head in layer["heads"]:
            held = np.cumsum(np.square(head["singular_values"]))
            assert head["modes"] == int(np.argmax(held >= held[-1] / 2)) + 1
            assert head["energy_share"] == pytest.approx(held[head["modes"] - 1] / held[-1])
    assert "modes" not in json.loads(run("inspect", source.path, "--json").stdout)["layers"][0]["heads"][0]
    counts = {head["modes"] for head in shown["layers"][0]["heads"]}
    (row,) = [line.split() for line in run("inspect", source.path, "--energy", 0.5, "--modes", 8, "--layers", 0)
              .stdout.splitlines() if line.split()[:1] == ["0"]]  # fmt: skip
    assert row[3] in (f"{min(counts)}-{max(counts)}", ",".join(map(str, sorted(counts))), str(min(counts)))


# -------- told and proven


def rewrite(out: Path, change: Callable[[Any], object]) -> None:
    document = json.loads((out / "qkpatch.json").read_text())
    change(document)
    (out / "qkpatch.json").write_text(json.dumps(document))


def swap(edit: Any) -> None:
    a, b, _ = edit["edits"]
    a["layers"], b["layers"] = b["layers"], a["layers"]


LIES: dict[str, Callable[[Any], object]] = {
    "another alpha of an item": lambda edit: edit["edits"][0].update(alpha=0.6),
    "another number of modes": lambda edit: edit["edits"][1].update(modes=3, modes_edited=3),
    "another channel": lambda edit: edit["edits"][1].update(channel="full"),
    "another energy": lambda edit: edit["edits"][2].update(energy=0.99),
    "another floor": lambda edit: edit["edits"][2].update(min_modes=8),
    "another ceiling": lambda edit: edit["edits"][2].update(modes=2, modes_edited=2),
    "no energy": lambda edit: [edit["edits"][2].pop(key) for key in ("energy", "min_modes")],
    "a floor without energy": lambda edit: edit["edits"][0].update(min_modes=1),
    "another number of edited modes": lambda edit: edit["edits"][0].update(modes_edited=4),
    "items of each other's layers": swap,
    "an item left out": lambda edit: edit["edits"].pop(),
    "a layer in two items": lambda edit: edit["edits"][0].update(layers=[0, 1]),
    "a layer more": lambda edit: edit["edits"][0].update(layers=[0, 4]),
    "other layers than those of its items": lambda edit: edit.update(layers=[0, 1]),
    "no item": lambda edit: edit.update(edits=[]),
    "items, and one for all": lambda edit: edit.update(
        modes=4, modes_edited=4, alpha=0.8, channel="full", select="dominant"
    ),
    "items, and an energy for all": lambda edit: edit.update(energy=0.5),
    "items, and alpha for all": lambda edit: edit.update(alpha=0.5),
    "an item without alpha": lambda edit: edit["edits"][0].pop("alpha"),
    "an item without layers": lambda edit: edit["edits"][0].pop("layers"),
    "no items": lambda edit: edit.pop("edits"),
    "an item twice": lambda edit: edit["edits"].append(edit["edits"][0]),
    "a uniform edit": lambda edit: edit.update(edit.pop("edits")[0], layers=edit["layers"]),
    "settings that the recipe gave": lambda edit: edit.update(from_recipe=["modes"]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_verify_finds_an_item_that_is_not_what_was_done(
    lie: str, source: Tiny, tmp_path: Path, run: Run
) -> None:
    made(source, tmp_path / "out", edits=THREE)
    rewrite(tmp_path / "out", lambda document: LIES[lie](document["edit"]))
    result = run("verify", tmp_path / "out", "--source", source.path)
    assert result.exit_code in (1, 3), result.output
    assert isinstance(result.exception, SystemExit)


ENERGY_LIES: dict[str, Callable[[Any], object]] = {
    "another energy": lambda edit: edit.update(energy=0.99),
    "no energy": lambda edit: [edit.pop(key) for key in ("energy", "min_modes")],
    "another floor": lambda edit: edit.update(min_modes=8),
    "another ceiling": lambda edit: edit.update(modes=1, modes_edited=1),
    "no floor": lambda edit: edit.pop("min_modes"),
    "an energy that there is none of": lambda edit: edit.update(energy=1.5),
    "modes of the recipe": lambda edit: edit.update(from_recipe=["layers", "modes"]),
}


@pytest.mark.parametrize("lie", ENERGY_LIES)
def test_verify_finds_another_energy(lie: str, source: Tiny, tmp_path: Path, run: Run) -> None:
    made(source, tmp_path / "out", energy=0.4, min_modes=2, modes=8)
    rewrite(tmp_path / "out", lambda document: ENERGY_LIES[lie](document["edit"]))
    result = run("verify", tmp_path / "out", "--source", source.path)
    assert result.exit_code in (1, 3), result.output
    assert isinstance(result.exception, SystemExit)


def test_nonsense_in_what_is_recorded_of_items_is_refused_or_does_not_matter(
    source: Tiny, tmp_path: Path, run: Run
) -> None:
    made(source, tmp_path / "out", edits=THREE[:1] + THREE[2:])
    text = (tmp_path / "out" / "qkpatch.json").read_text()
    for i, key, value in product((0, 1), (None, *LAYERS_KEYS), (ABSENT, None, "text", -1, [], {})):
        document = json.loads(text)
        items = document["edit"]["edits"]
        at, name = (items, i) if key is None else (items[i], key)
        at[name] = value
        if value is ABSENT:
            del at[name]
        (tmp_path / "out" / "qkpatch.json").write_text(json.dumps(document))
        result = run("verify", tmp_path / "out", "--source", source.path, "--no-recompute", "--quiet")
        assert isinstance(result.exception, SystemExit | None), (i, key, value, result.exception)
        # Null is what the first item says of energy anyway, which it does not have.
        is_so = document == json.loads(text) or (i == 0 and value is None and key in ("energy", "min_modes"))
        assert result.exit_code in ((0,) if is_so else (1, 3)), (i, key, value)


def test_weights_of_another_item_are_found(source: Tiny, tmp_path: Path, run: Run) -> None:
    other = [{**THREE[0], "alpha": 0.6}, *THREE[1:]]
    made(source, tmp_path / "out", edits=THREE)
    made(source, tmp_path / "other", edits=other)
    (tmp_path / "out" / "model.safetensors").write_bytes(
        (tmp_path / "other" / "model.safetensors").read_bytes()
    )
    result = run("verify", tmp_path / "out", "--source", source.path)
    assert result.exit_code == 1
    assert "layers.0." in result.stdout
    assert "layers.1." not in result.stdout


@pytest.mark.parametrize(
    "edit",
    [
        {"edits": THREE},
        {"edits": [{**THREE[0], "alpha": 1e-17}, {**THREE[1], "alpha": 1 / 3, "energy": 0.1 + 0.2}], "heads": "1-2"},
        {"energy": 1 / 3, "min_modes": 2, "select": "random", "seed": 5},
    ],
    ids=["by layer", "all digits", "by energy"],
)  # fmt: skip
def test_a_card_says_how_to_make_it_again(
    edit: Item, source: Tiny, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(source, tmp_path / "out", **edit)
    monkeypatch.chdir(tmp_path)
    card = run("card", "out").stdout
    if "edits" in edit:
        (tmp_path / "edit.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
        assert "| selection, layers 0 | dominant, 3 mode(s) per head |" in card
        assert "| channel of `W_Qᵀ W_K`, layers 1,3 | symmetric |" in card
    else:
        assert "| selection | random, ≤ 4 (energy 0.3333333333333333) mode(s) per head |" in card
    words = shlex.split(next(line for line in card.splitlines() if line.startswith("qkpatch apply")))
    words[words.index("OUT")] = "again"
    assert run(*words[1:]).exit_code == 0
    assert record(tmp_path / "again")["edits"] == first["edits"]
    assert queries(tmp_path / "again").keys() == queries(tmp_path / "out").keys()
    (tmp_path / "out" / "README.md").write_text(card)
    assert run("verify", "out", "--source", "source").exit_code == 0


def test_edits_that_differ_have_names_that_differ(source: Tiny) -> None:
    edits: list[Item] = [
        {}, {"energy": 0.5}, {"energy": 0.5, "min_modes": 2}, {"edits": THREE}, {"edits": THREE[:2]},
        {"edits": [*THREE[:2], {**THREE[2], "energy": 0.7}]},
    ]  # fmt: skip
    names = {qkpatch.plan(source.path, **edit).default_name for edit in edits}
    assert len(names) == len(edits)
    assert qkpatch.plan(source.path, edits=THREE[::-1]).default_name in names


def test_an_edit_on_top_of_an_uneven_one_tells_it(source: Tiny, tmp_path: Path, run: Run) -> None:
    first = made(source, tmp_path / "one", edits=THREE)
    assert run("apply", tmp_path / "one", "-o", tmp_path / "two").exit_code == 0
    assert record(tmp_path / "two")["source"]["previous_edit"] == first["edit"]
    assert run("verify", tmp_path / "two", "--source", tmp_path / "one").exit_code == 0
    assert (
        "edited by qkpatch before: layers 0, 3 dominant mode(s), alpha 0.5, full channel; layers 1,3, 2 dominant"
        in run("card", tmp_path / "two").stdout
    )


def test_what_does_nothing_in_some_layers_is_said(source: Tiny) -> None:
    items = [{"layers": "0-1", "alpha": 1}, {"layers": 2, "channel": "antisymmetric", "modes": 3}]
    plan = qkpatch.plan(source.path, edits=items)
    assert {edit.layer for edit in plan.edits} == {2}
    assert "alpha 1 is a declared no-op: layers 0-1 stay as they are" in plan.warnings
    assert "antisymmetric modes come in equal pairs: 3 rounded up to 4" in plan.warnings
    idle = qkpatch.plan(source.path, edits=[{"layers": 0, "modes": 2}, {"layers": 1}], alpha=1)
    assert "alpha 1 is a declared no-op: OUT will be a byte-identical copy of SOURCE" in idle.warnings


def test_a_loaded_model_is_edited_by_layer_and_by_energy(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "source")
    edit = {"edits": [{"layers": 0, "modes": 2}, {"layers": "1-2", "energy": 0.5, "channel": "symmetric"}]}
    qkpatch.apply(qkpatch.plan(tmp_path / "source", **edit), tmp_path / "out")
    with qkpatch.patched(model, **edit):
        for name, stored in load_file(tmp_path / "out" / "model.safetensors").items():
            assert torch.equal(model.state_dict()[name], stored)


def test_spectra_of_items_are_those_of_each_with_its_own_cut_and_channel(
    source: Tiny, tmp_path: Path, run: Run
) -> None:
    found = {layer.layer: layer for layer in qkpatch.spectra(source.path, edits=THREE)}
    assert [*found] == [0, 1, 2, 3]
    for item in THREE:
        alone = qkpatch.spectra(source.path, **{key: said for key, said in item.items() if key != "alpha"})
        assert [found[layer.layer] for layer in alone] == [*alone]
    # What `apply` takes of each head is what was seen before.
    manifest = qkpatch.apply(qkpatch.plan(source.path, edits=THREE), tmp_path / "out")
    taken = {edit.layer: [len(head.modes) for head in edit.heads] for edit in manifest.edits}
    assert taken == {n: [head.modes for head in layer.heads] for n, layer in found.items()}
    config = tmp_path / "edit.yaml"
    config.write_text(json.dumps({"edits": THREE}))
    shown = json.loads(run("inspect", source.path, "--config", config, "--json").stdout)
    assert "modes" not in shown
    heads = {one["layer"]: [head["modes"] for head in one["heads"]] for one in shown["layers"]}
    assert heads == taken
    table = run("inspect", source.path, "--config", config).stdout
    told = {
        int(line.split()[0]): line.split()[3] for line in table.splitlines() if line[:6].strip().isdigit()
    }
    assert told == {n: format_ranges(sorted({*modes})) for n, modes in taken.items()}
