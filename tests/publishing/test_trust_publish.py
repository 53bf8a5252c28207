"""What is published is what was verified.

One attack of a kind by default; its relatives are marked `stress`.
"""

# Fixtures are imported, and asked for by the names of parameters.
# ruff: noqa: F401, F811

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import build_tiny
from fake_hub import Repo, hub_environment, run_qkpatch
from published import CARD, PATCHED, UNTOUCHED, World, flip, made, refused, rewrite, stress, sub_folder, world
from typer.testing import Result

from qkpatch.checkpoint.names import is_private
from qkpatch.checkpoint.open_directory import Rooted
from qkpatch.checkpoint.present_files import PresentHere
from qkpatch.compare.verify import recorded
from qkpatch.errors import CheckpointError
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.plan import make_plan
from qkpatch.publishing import commit_plan as publication
from qkpatch.publishing.private_files import Insisted

# -------- what was verified


def test_an_output_is_verified_by_the_hubs_digests_with_the_planned_rows_alone_fetched(world: World) -> None:
    """Nothing but the Hub is believed: the cache that OUT was made from is damaged in all it has."""
    cache = world.cache()
    spoilt = [p for p in cache.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".json", ".md")]
    kept = {path: path.read_bytes() for path in spoilt}
    try:
        for path in spoilt:
            flip(path.resolve())
        result = world.card()
    finally:
        for path, data in kept.items():
            path.resolve().write_bytes(data)
    assert result.returncode == 0, result.stderr
    rows, headers = 2 * world.base.d_head * world.base.d_model * 2, 64 << 10
    # Once for the digest of the file, and once for the arithmetic, which takes all else from OUT.
    assert rows <= world.hub.sent_of(PATCHED) <= 2 * rows + headers
    assert world.hub.sent_of(".safetensors") <= 2 * rows + 3 * headers
    (commit,) = world.hub.commits
    digest = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in world.out.iterdir()}
    assert commit.large == {name: digest[name] for name in digest if name.endswith(".safetensors")}
    assert set(world.hub.uploads) == {digest[PATCHED]}
    assert {file["filename"] for file in world.hub.duplicated[0]["files"]} == commit.large.keys() - {PATCHED}
    assert ".gitattributes" in commit.files
    assert "checked byte for byte" in commit.files["README.md"].decode()
    # Nobody checked for a card that is only printed.
    plain = run_qkpatch(world.environment, "card", world.out)
    assert "checked byte for byte" not in plain.stdout
    assert "qkpatch verify OUT" in plain.stdout


def test_an_output_that_is_not_what_its_manifest_says_is_not_published(world: World) -> None:
    flip(world.out / UNTOUCHED)
    result = world.card("--source", "org/base")
    refused(world, result, 1, UNTOUCHED)
    assert f"qkpatch verify {world.out} --source org/base" in result.stderr
    assert world.hub.created == {}


def forge(out: Path) -> None:
    """One bit of a planned row, and the digest that says so."""
    begin, end = json.loads((out / "qkpatch.json").read_bytes())["edits"][0]["byte_range"]
    flip(out / PATCHED, begin)
    digest = hashlib.sha256((out / PATCHED).read_bytes()[begin:end]).hexdigest()
    rewrite(out, lambda m: m["edits"][0].update(sha256_after=digest))


def test_an_edit_that_was_not_made_as_recorded_is_not_published(world: World) -> None:
    forge(world.out)
    refused(world, world.card(), 1, "OUT does not have the edit as it is computed anew")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a planned row and its digest": forge,
    "a byte of an unplanned row": lambda out: flip(out / PATCHED, 3000),
    "the last byte of the patched shard": lambda out: flip(out / PATCHED),
    "a small file": lambda out: flip(out / "tokenizer.json"),
    "the card": lambda out: (out / "README.md").write_text(CARD.replace("Base", "Best")),
    "one more file": lambda out: (out / "modeling_x.py").write_text("import os"),
    "one file less": lambda out: (out / "tokenizer.json").unlink(),
    "an edited tensor": lambda out: rewrite(out, lambda m: m["edits"][0].update(sha256_after="0" * 64)),
    "another commit": lambda out: rewrite(out, lambda m: m["source"].update(commit="0" * 40)),
    "one more file on record": lambda out: rewrite(
        out, lambda m: m["files"].append({**m["files"][0], "name": "nothing.json"})
    ),
    "a size": lambda out: rewrite(out, lambda m: m["files"][0].update(size=1)),
    "a digest of a file": lambda out: rewrite(out, lambda m: m["files"][0].update(sha256="0" * 64)),
}


@stress
@pytest.mark.parametrize("what", DAMAGE)
@pytest.mark.parametrize("source", ["hub", "directory", "cache"])
def test_whatever_differs_is_not_published(world: World, what: str, source: str) -> None:
    DAMAGE[what](world.out)
    given = {"hub": (), "directory": ("--source", world.base.path), "cache": ("--source", world.cache())}
    result = world.card(*given[source])
    assert result.returncode in ((1, 4) if what == "another commit" else (1,)), result.stderr
    assert world.hub.commits == []


def test_verify_needs_no_download_and_is_as_strict(world: World, tmp_path: Path) -> None:
    empty = hub_environment(world.hub.endpoint, tmp_path / "home")
    flip(world.out / PATCHED, 3000)
    result = run_qkpatch(empty, "verify", world.out, "--source", "org/base")
    assert result.returncode == 1
    assert PATCHED in result.stdout
    assert UNTOUCHED not in result.stdout
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert world.hub.sent_of(UNTOUCHED) <= 64 << 10


@stress
@pytest.mark.parametrize("shard", ["20KB", "100MB"])
@pytest.mark.parametrize("damage", [False, True])
def test_a_resharded_output_is_verified_by_the_hubs_digests(
    made: World, world: World, tmp_path: Path, shard: str, damage: bool
) -> None:
    empty = hub_environment(world.hub.endpoint, tmp_path / "home")
    out, flags = tmp_path / "resharded", ("--max-shard-size", shard, "--quiet")
    assert run_qkpatch(world.environment, "apply", "org/base", "-o", out, *flags).returncode == 0
    if damage:
        flip(sorted(out.glob("*.safetensors"))[0])
    result = run_qkpatch(empty, "verify", out, "--source", "org/base")
    assert result.returncode == (1 if damage else 0), result.stdout + result.stderr


@stress
@pytest.mark.parametrize("source", ["hub", "cache", "directory"])
def test_verify_of_every_kind_of_source_finds_the_same(world: World, source: str) -> None:
    where = {"hub": "org/base", "cache": world.cache(), "directory": world.base.path}[source]
    good = world.verify(where)
    assert good.returncode == 0, good.stdout
    assert ("note" in good.stdout) == (source == "directory")
    for name in (UNTOUCHED, "tokenizer.json"):
        flip(world.out / name)
    bad = world.verify(where)
    assert bad.returncode == 1
    assert UNTOUCHED in bad.stdout
    assert "tokenizer.json" in bad.stdout


# -------- where it is from


def test_the_repository_that_a_manifest_names_must_be_the_one(world: World, tmp_path: Path) -> None:
    """Untouched shards were once copied on the Hub's side from wherever the manifest pointed, by size alone."""
    evil = tmp_path / "evil"
    shutil.copytree(world.base.path, evil)
    flip(evil / UNTOUCHED)
    world.hub.repos["org/evil"] = Repo(evil)
    rewrite(
        world.out, lambda m: m["source"].update(name="org/evil", commit=world.hub.repos["org/evil"].commit)
    )
    refused(world, world.card(), 1, UNTOUCHED)


def test_what_is_copied_on_the_hubs_side_is_chosen_by_digest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, sizes and the manifest's word for it are not enough."""
    good = {name: world.repo.sha256(name) for name in (UNTOUCHED, PATCHED)}
    wish = publication.Wish(
        publication.parse_repository("me/new", private=False, create_pr=False), Insisted()
    )
    monkeypatch.setattr(publication, "check_repository", lambda *_: None)
    with Rooted(world.out) as root:
        present = PresentHere(root)
        manifest = recorded(present)
        plan = make_plan(str(world.base.path), manifest.request())
        for listed, copied in ((good, {UNTOUCHED}), ({**good, UNTOUCHED: "0" * 64}, set())):
            monkeypatch.setattr(publication, "copyable", lambda _, listed=listed: listed)
            steps = publication.plan_publication(wish, manifest, plan, present).steps
            assert {step.name for step in steps if step.is_copy} == copied


@stress
@pytest.mark.parametrize("key", ["name", "commit"])
def test_every_way_to_look_finds_a_forged_origin(
    world: World, tmp_path: Path, run: Callable[..., Result], key: str
) -> None:
    shutil.copytree(world.base.path, tmp_path / "evil")
    (tmp_path / "evil" / "one more.txt").write_text("x")
    world.hub.repos["org/evil"] = Repo(tmp_path / "evil")
    forged = {"name": "org/evil", "commit": world.hub.repos["org/evil"].commit}[key]
    rewrite(world.out, lambda m: m["source"].update({key: forged}))
    refused(world, world.card("--source", "org/base"), 1, f"source.{key}")
    refused(world, world.card("--source", world.cache()), 1, f"source.{key}")
    for source in ("org/base", world.cache()):
        found = world.verify(source)
        assert found.returncode == 1
        assert f"source.{key}" in found.stdout
    result = world.card(
        "--source", world.base.path
    )  # where the name is not looked at, and so the Hub is asked
    assert result.returncode in (1, 4)
    assert world.hub.commits == []


@stress
def test_the_name_of_a_repository_may_be_written_in_other_letters(world: World) -> None:
    rewrite(world.out, lambda m: m["source"].update(name="Org/Base"))
    assert world.verify("org/base").returncode == 0


@stress
def test_a_directory_proves_no_repository_and_verify_says_so(
    world: World, run: Callable[..., Result]
) -> None:
    document = json.loads(run("verify", world.out, "--source", world.base.path, "--json").stdout)
    assert document["ok"] is True
    assert "org/base" in document["notes"][0]
    # A push asks the repository as well.
    assert world.card("--source", world.base.path).returncode == 0
    assert len(world.hub.commits) == 1


@stress
@pytest.mark.parametrize("change", ["forged", "removed"])
def test_the_edit_before_this_one_must_be_sources(
    tmp_path: Path, run: Callable[..., Result], change: str
) -> None:
    source = build_tiny(tmp_path / "source")
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("apply", source.path, "-o", first).exit_code == 0
    assert run("apply", first, "-o", second).exit_code == 0
    assert run("verify", second, "--source", first).exit_code == 0
    rewrite(
        second,
        lambda m: (
            m["source"].pop("previous_edit")
            if change == "removed"
            else m["source"]["previous_edit"].update(alpha=0.1)
        ),
    )
    result = run("verify", second, "--source", first)
    assert result.exit_code == 1
    assert "previous_edit" in result.stdout


@stress
def test_a_folder_with_the_repositorys_name_is_not_taken_for_it(world: World, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(world.base.path, here / f"org/base@{world.repo.commit}")
    result = world.card(cwd=here)
    refused(world, result, 2, "hides it")


@stress
def test_what_was_made_from_a_directory_is_published_with_its_source_alone(
    world: World, run: Callable[..., Result]
) -> None:
    shutil.rmtree(world.out)
    assert run("apply", world.base.path, "-o", world.out).exit_code == 0
    refused(world, world.card(), 2, "--source")
    assert world.card("--source", world.base.path).returncode == 0
    assert world.hub.duplicated == []
    # Nothing is copied from a repository that nobody named, though it has the same files.
    assert len(world.hub.uploads) == 3


# -------- links


@pytest.mark.parametrize("name", ["README.md"])
def test_a_link_in_an_output_is_not_followed(
    world: World, tmp_path: Path, run: Callable[..., Result], name: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    (world.out / name).unlink()
    (world.out / name).symlink_to(secret)
    printed = run("card", world.out)
    assert printed.exit_code == 4
    assert "a secret" not in printed.output
    assert f"{name}: is a link" in run("verify", world.out, "--source", world.base.path).stdout


ODD: dict[str, Callable[[Path, Path], object]] = {
    "a link to the same bytes": lambda path, copy: path.symlink_to(copy),
    "a link out of nowhere": lambda path, copy: path.symlink_to("nowhere"),
    "a pipe": lambda path, copy: os.mkfifo(path),
    "a directory": lambda path, copy: path.mkdir(),
}


@stress
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["qkpatch.json", "README.md", UNTOUCHED, PATCHED, "tokenizer.json", "more"])
def test_whatever_is_no_regular_file_is_named_and_never_read(
    world: World, tmp_path: Path, run: Callable[..., Result], kind: str, name: str
) -> None:
    copy = tmp_path / "copy"
    if (world.out / name).exists():
        (world.out / name).rename(copy)
    ODD[kind](world.out / name, copy)
    if kind == "a directory" and name == "more":
        return  # with nothing in it, it is nothing
    assert world.card().returncode in (1, 3)
    assert world.hub.commits == []
    checked = run("verify", world.out, "--source", world.base.path)
    assert checked.exit_code == (3 if name == "qkpatch.json" else 1), checked.output
    assert name in checked.output
    assert run("card", world.out).exit_code in ((3,) if name == "qkpatch.json" else (0, 4))


@stress
def test_a_folder_of_an_output_that_is_a_link_is_not_entered(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    source, out = build_tiny(tmp_path / "source"), tmp_path / "out"
    (sub_folder(source.path / "sub") / "text").write_text("text")
    assert run("apply", source.path, "-o", out).exit_code == 0
    (out / "sub").rename(tmp_path / "sub")
    (out / "sub").symlink_to(tmp_path / "sub")
    result = run("verify", out, "--source", source.path)
    assert result.exit_code == 1
    assert "sub: is a link" in result.stdout


# -------- names in a manifest


def test_a_manifest_that_names_files_elsewhere_is_refused(
    world: World, tmp_path: Path, run: Callable[..., Result]
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    rewrite(world.out, lambda m: m["files"].append({**m["files"][0], "name": str(secret), "size": 8}))
    result = run("verify", world.out, "--source", world.base.path)
    assert result.exit_code == 3
    assert "no plain path" in result.stderr


@stress
@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../up", "a/../../up", "a/./b", "./a", "a//b", "a/", "", ".", "..", "a\0b", "qkpatch.json",
        "twice", "\ud800",
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["file", "shard", "key_shard", "scale_shard"])
def test_no_name_in_a_manifest_leads_out_or_comes_twice(made: World, name: str, where: str) -> None:
    document = json.loads((made.out / "qkpatch.json").read_bytes())
    if where == "file":
        document["files"] += [{**document["files"][0], "name": name}] * (2 if name == "twice" else 1)
    elif name in ("twice", "qkpatch.json") or (name == "" and where == "scale_shard"):
        return
    else:
        document["edits"][0][where] = name
    with pytest.raises(CheckpointError, match=r"malformed|not valid"):
        Manifest.loads(json.dumps(document).encode(), "it")


# -------- between hashing and sending


MEDDLE: dict[str, Callable[[Path], object]] = {
    "written to": lambda path: flip(path),
    "replaced": lambda path: (
        path.with_name("new").write_bytes(bytes(path.stat().st_size)),
        path.with_name("new").rename(path),
    ),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "restored": lambda path: (path.write_bytes(path.read_bytes()), os.utime(path, ns=(0, 0))),
    "linked": lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
    "removed": lambda path: path.unlink(),
}


def test_what_changes_before_the_commit_stops_it(world: World) -> None:
    world.hub.meddle["/preupload/"] = lambda: flip(world.out / PATCHED)
    refused(world, world.card(), 4, PATCHED)


@stress
@pytest.mark.parametrize("how", MEDDLE)
@pytest.mark.parametrize("moment", ["/preupload/", "/upload/", "/api/repos/create", "/tree/", "/resolve/"])
@pytest.mark.parametrize("name", [PATCHED, UNTOUCHED, "tokenizer.json"])
def test_whatever_changes_at_whatever_moment_no_other_bytes_are_committed(
    world: World, how: str, moment: str, name: str
) -> None:
    good = {p.name: p.read_bytes() for p in world.out.iterdir()}
    world.hub.meddle[moment] = lambda: MEDDLE[how](world.out / name)
    result = world.card()
    assert "Traceback" not in result.stderr
    assert result.returncode in (1, 4), result.stderr
    for commit in world.hub.commits:
        assert {n: hashlib.sha256(good[n]).hexdigest() for n in commit.large} == commit.large
    assert world.hub.commits == []


@stress
def test_large_files_are_sent_by_descriptor(world: World, tmp_path: Path) -> None:
    source, out = tmp_path / "large", tmp_path / "edited"
    wide = {"n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_model": 24}
    extra = {"lm_head.weight": torch.zeros(6 << 20).bfloat16()}
    build_tiny(source, extra=extra, **wide)  # type: ignore[arg-type]
    result = run_qkpatch(world.environment, "apply", source, "-o", out, "--push", "me/new")
    assert result.returncode == 0, result.stderr
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert world.hub.commits[0].large == {"model.safetensors": digest}
    assert hashlib.sha256(world.hub.uploads[digest]).hexdigest() == digest


@stress
def test_an_ignore_file_on_the_hub_leaves_nothing_out(world: World) -> None:
    world.hub.ignored.clear()
    assert world.card().returncode == 0
    assert set(world.hub.ignored) == {""}


# -------- dry runs


@stress
def test_a_dry_run_of_a_card_does_all_but_send(world: World) -> None:
    result = world.card("--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"copy from org/base@{world.repo.commit[:12]}" in result.stdout
    assert world.hub.commits == []
    assert world.hub.created == {}
    assert {request.method for request in world.hub.log} <= {"GET", "HEAD"}
    flip(world.out / UNTOUCHED)
    refused(world, world.card("--dry-run"), 1, UNTOUCHED)


@stress
@pytest.mark.parametrize(
    "flags", [("--include", "x"), ("--include-hidden",), ("--source", "x"), ("--recipe", "x")]
)
def test_flags_that_go_with_push_alone(
    world: World, run: Callable[..., Result], flags: tuple[str, ...]
) -> None:
    assert run("card", world.out, *flags).exit_code == 2


@stress
def test_a_failed_upload_is_an_error_of_the_hub(world: World) -> None:
    world.hub.broken_uploads = True
    try:
        refused(world, world.card(), 4, "me/new")
    finally:
        world.hub.broken_uploads = False
