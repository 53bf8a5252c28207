"""OUT in a store: the bytes of a directory, in an order that no loader misreads, and nothing half published."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny, build_tiny_folder
from s3_server import S3, SECRET, Fault, Seen, make_bucket, upload

import qkpatch
from qkpatch.checkpoint.names import CLAIM
from qkpatch.common.observer import Unseen
from qkpatch.errors import QKPatchError, StoreError, UsageError
from qkpatch.stores import store
from qkpatch.stores.store import open_store
from qkpatch.stores.url import StoreUrl
from qkpatch.uploads import apply as uploading
from qkpatch.uploads import claim as claims
from qkpatch.uploads import objects
from qkpatch.uploads.claim import Claim, Done

EDIT: dict[str, Any] = {"layers": "0-1", "modes": 2}
SHARDS = [["layers.0.", "embed"], ["layers.1."], ["layers.2."]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(claims, "_NOTED", 1)  # so that small weights are noted, as large ones are


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_folder(tmp_path / "tiny", shards=SHARDS)


def objects_of(url: str) -> dict[str, bytes]:
    import fsspec

    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {path[len(root) :].strip("/"): fs.cat_file(path) for path in fs.find(root)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def without_run(files: dict[str, bytes]) -> dict[str, Any]:
    said: dict[str, Any] = {**files, "qkpatch.json": json.loads(files["qkpatch.json"])}
    del said["qkpatch.json"]["run"]
    said.pop("SHA256SUMS", None)  # has the digest of the manifest, and so of the run's time
    return said


@pytest.mark.parametrize(
    "how", [{}, {"max_shard_size": 2000}, {"heads": [1]}], ids=["plain", "resharded", "one head"]
)
@pytest.mark.parametrize("digest", ["edited", "files", "none"])
def test_out_in_a_store_is_what_it_is_in_a_directory(
    how: dict[str, Any], digest: str, folder: Path, place: str, tmp_path: Path
) -> None:
    plan, out = qkpatch.plan(folder, **EDIT, **how), f"{place}/out"
    qkpatch.apply(plan, tmp_path / "out", digest=digest)
    made = qkpatch.apply(plan, out, digest=digest)
    found = objects_of(out)
    assert without_run(found) == without_run(files_of(tmp_path / "out"))
    assert found["qkpatch.json"] == made.dumps().encode()
    assert qkpatch.verify(out, folder).ok
    assert qkpatch.diff(out, tmp_path / "out").equal
    if digest == "none":  # nothing shows that rows are as they were written, as in a directory
        with pytest.raises(UsageError, match="no digest of it is recorded"):
            qkpatch.apply(plan, out, digest=digest)
        return
    assert qkpatch.apply(plan, out, digest=digest).run.already_done
    assert qkpatch.plan(folder, out=out, **EDIT, **how).is_done


def test_what_is_sent_in_pieces_is_whole_or_not_there(
    folder: Path, memory: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PIECE", 1000)
    plan, out = qkpatch.plan(folder, **EDIT), "memory://bucket/out"
    qkpatch.apply(plan, tmp_path / "out")
    qkpatch.apply(plan, out, digest="files")
    found, wanted = objects_of(out), files_of(tmp_path / "out")
    assert {name: found[name] for name in wanted if name != "qkpatch.json"} == {
        name: data for name, data in wanted.items() if name != "qkpatch.json"
    }

    closed: list[bool] = []

    class Writer:
        closed = False

        def write(self, _: bytes) -> None:
            raise ConnectionError

        def close(self) -> None:
            closed.append(True)

        def discard(self) -> None:
            closed.append(False)

    import fsspec

    kind = fsspec.filesystem("memory").__class__
    opened = kind.open

    def broken(fs: Any, path: str, mode: str = "rb", **how: Any) -> Any:
        return Writer() if "block_size" in how else opened(fs, path, mode, **how)

    monkeypatch.setattr(kind, "open", broken)
    with pytest.raises(StoreError):
        qkpatch.apply(plan, "memory://bucket/other")
    assert closed == [False]  # to close it would make an object of what came so far


class Stopped(Unseen):
    """Interrupts a run when a piece of an object is on its way."""

    def copied(self, n_bytes: int) -> None:
        if n_bytes == store.PIECE:
            raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["gs", "az"], indirect=True)
def test_a_piece_of_what_is_interrupted_is_never_seen(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PIECE", 1 << 18)  # the least that Google's client takes
    padding = {"model.layers.0.pad": torch.arange(700_000, dtype=torch.int64).to(torch.uint8)}
    folder = build_tiny(tmp_path / "tiny", extra=padding, shards=SHARDS).path
    plan, out, wanted = qkpatch.plan(folder, **EDIT), f"{place}/out", f"{tmp_path}/out"
    qkpatch.apply(plan, wanted, digest="files")
    with pytest.raises(KeyboardInterrupt):
        qkpatch.apply(plan, out, resume=True, observer=Stopped())
    gc.collect()  # a file that is closed, or forgotten, would become an object of what came so far
    assert not {"model-00001-of-00003.safetensors", "qkpatch.json"} & objects_of(out).keys()
    qkpatch.apply(plan, out, digest="files", overwrite=True)
    assert without_run(objects_of(out)) == without_run(files_of(Path(wanted)))


@pytest.mark.long
def test_on_s3_every_byte_of_source_stays_there_and_only_rows_are_sent(s3: S3, tmp_path: Path) -> None:
    padding = {f"model.layers.{n}.pad": torch.zeros(12 << 20, dtype=torch.uint8) for n in (0, 2)}
    tiny = build_tiny(tmp_path / "tiny", extra=padding, shards=SHARDS, d_model=512)
    url = upload(tiny.path, "models", f"{tmp_path.name}/in")
    out = f"s3://models/{tmp_path.name}/out"
    qkpatch.apply(qkpatch.plan(tiny.path, **EDIT), tmp_path / "out")
    s3.clear()
    made = qkpatch.apply(qkpatch.plan(url, **EDIT), out)
    received = s3.received
    found, wanted = objects_of(out), files_of(tmp_path / "out")
    assert found.pop("qkpatch.json") != wanted.pop("qkpatch.json")
    assert found == wanted
    assert made.run.copied_by == {"store_copy": 4, "part_copy": 2}
    copies = s3.of("PART_COPY")
    assert copies
    assert all("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH" in seen.asked for seen in [*copies, *s3.of("COPY")])
    # The edited rows, and what S3's least part takes along.
    sent = sum(seen.sent for seen in s3.log if seen.what in ("PUT", "PART"))
    assert sent < 3 * (5 << 20) + 2 * (1 << 20)
    assert received < 3 * (5 << 20) + 4 * (1 << 20)
    # Weights, other files, index and config.json, the manifest; only whole objects are ever seen.
    made_in_order = [
        seen.key.rpartition("/")[2] for seen in s3.log if seen.what in ("PUT", "COPY", "COMPLETE")
    ]
    names = [name for name in dict.fromkeys(made_in_order) if name != CLAIM]
    assert made_in_order[0] == CLAIM
    assert names[:3] == [f"model-0000{n}-of-00003.safetensors" for n in (3, 1, 2)]
    assert names[-3:] == ["model.safetensors.index.json", "config.json", "qkpatch.json"]
    assert qkpatch.verify(out, url).ok
    assert qkpatch.verify(out, tiny.path).ok


def test_from_a_directory_to_a_store_and_back(cloud: str, folder: Path, run: Any, tmp_path: Path) -> None:
    out = f"{cloud}/out"
    done = run("apply", folder, "--layers", "0-1", "--modes", "2", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"Wrote {out}" in done.output
    assert f"Prove it with: qkpatch verify {out} --source" in done.output
    assert run("verify", out, "--source", folder).exit_code == 0
    assert "is that already" in run("plan", folder, "--layers", "0-1", "--modes", "2", "-o", out).output
    assert run("diff", folder, out).exit_code == 1
    again = run("apply", out, "--layers", "2", "-o", tmp_path / "twice")
    assert again.exit_code == 0, again.output
    assert run("verify", tmp_path / "twice", "--source", out).exit_code == 0
    assert run("inspect", out, "--layers", "0-1").exit_code == 0
    assert SECRET not in done.output + again.output + (tmp_path / "twice" / "qkpatch.json").read_text()


def test_within_one_store_and_what_it_copies_itself(cloud: str, folder: Path, tmp_path: Path) -> None:
    scheme, _, inner = cloud.partition("://models/")
    source, out = upload(folder, "models", f"{inner}/in", scheme), f"{cloud}/out"
    qkpatch.apply(qkpatch.plan(folder, **EDIT), tmp_path / "out")
    made = qkpatch.apply(qkpatch.plan(source, **EDIT), out)
    found, wanted = objects_of(out), files_of(tmp_path / "out")
    assert found.pop("qkpatch.json") != wanted.pop("qkpatch.json")
    assert found == wanted
    edited = {"s3": "part_copy", "gs": "upload"}
    assert made.run.copied_by == {"upload": 8} if scheme == "az" else {"store_copy": 6, edited[scheme]: 2}
    assert qkpatch.verify(out).ok


class Harm:
    """Does something at the n-th request of a kind."""

    def __init__(self, what: str, n: int, does: Callable[[], Fault | None]) -> None:
        self.what, self.left, self.does = what, n, does

    def __call__(self, seen: Seen) -> Fault | None:
        if seen.what == self.what:
            self.left -= 1
            if self.left <= 0:
                return self.does()
        return None


def uploads_left(s3: S3, bucket: str) -> int:
    import fsspec

    fs = fsspec.filesystem("s3", use_listings_cache=False)
    return len(fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", []))


def test_a_part_that_fails_leaves_no_upload_and_a_run_that_resumes_ends_it(s3: S3, tmp_path: Path) -> None:
    padding = {"model.layers.0.pad": torch.zeros(20 << 20, dtype=torch.uint8)}
    tiny = build_tiny(tmp_path / "tiny", extra=padding, shards=SHARDS)
    out = f"{make_bucket('models')}/{tmp_path.name}"
    plan = qkpatch.plan(tiny.path, **EDIT)
    s3.fault = Harm("PART", 1, lambda: Fault("AccessDenied", "403 Forbidden"))
    with pytest.raises(StoreError) as told:
        qkpatch.apply(plan, out)
    assert "--resume" in str(told.value.fix)
    assert s3.of("ABORT")
    s3.clear()
    assert uploads_left(s3, "models") == 0
    found = objects_of(out)
    assert CLAIM in found
    assert not {"qkpatch.json", "config.json", "model-00001-of-00003.safetensors"} & found.keys()
    with pytest.raises(QKPatchError, match="not finished"):
        qkpatch.plan(out)
    with pytest.raises(QKPatchError, match="not finished"):
        qkpatch.verify(out, tiny.path)
    with pytest.raises(UsageError, match="not finished"):
        qkpatch.apply(plan, out)
    made = qkpatch.apply(plan, out, resume=True)
    assert made.run.copied_by is not None
    assert made.run.copied_by["resumed"] >= 1
    assert qkpatch.verify(out, tiny.path).ok
    assert CLAIM not in objects_of(out)


@pytest.mark.long
def test_what_passes_is_waited_for(s3: S3, folder: Path, tmp_path: Path) -> None:
    out = f"{make_bucket('models')}/{tmp_path.name}"
    left = dict.fromkeys(("LIST", "PUT", "HEAD", "GET"), 2)

    def fault(seen: Seen) -> Fault | None:
        if left.get(seen.what, 0) == 0:
            return None
        left[seen.what] -= 1
        return Fault("SlowDown")

    s3.fault = fault
    qkpatch.apply(qkpatch.plan(folder, **EDIT), out)
    assert set(left.values()) == {0}
    assert qkpatch.verify(out, folder).ok


def test_no_permission_and_no_bucket_are_told_before_anything_is_computed(
    cloud: str, request: pytest.FixtureRequest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = qkpatch.plan(folder, **EDIT)
    monkeypatch.setattr("qkpatch.uploads.apply.editor_of", None)
    with pytest.raises(StoreError, match="no such bucket"):
        qkpatch.apply(plan, f"{cloud.partition(':')[0]}://there-is-none/out")
    if not cloud.startswith("s3:"):  # emulators forbid nothing
        return
    s3: S3 = request.getfixturevalue("s3")
    out = f"{make_bucket('models')}/{tmp_path.name}"
    s3.fault = Harm("PUT", 1, lambda: Fault("AccessDenied", "403 Forbidden"))
    with pytest.raises(StoreError, match="forbids"):
        qkpatch.apply(plan, out)
    s3.clear()
    assert objects_of(out) == {}


def test_an_interrupt_leaves_nothing_or_with_resume_what_was_done(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = qkpatch.plan(folder, **EDIT), f"{place}/out"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Claim, "check_made", interrupt)
        with pytest.raises(KeyboardInterrupt):
            qkpatch.apply(plan, out)
        assert not objects_of(out)
        with pytest.raises(KeyboardInterrupt):
            qkpatch.apply(plan, out, resume=True)
        assert CLAIM in objects_of(out)
        assert "qkpatch.json" not in objects_of(out)
    made = qkpatch.apply(plan, out, resume=True)
    assert (made.run.copied_by or {})["resumed"] == 8
    assert qkpatch.verify(out, folder).ok


def test_an_unfinished_out_of_another_edit_is_removed_on_demand_alone(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = f"{place}/out"
    with monkeypatch.context() as patched:
        patched.setattr(Claim, "check_made", lambda *_: (_ for _ in ()).throw(StoreError("x")))
        with pytest.raises(StoreError):
            qkpatch.apply(qkpatch.plan(folder, layers="0-2", modes=1, max_shard_size=2000), out)
    before = objects_of(out)
    plan = qkpatch.plan(folder, **EDIT)
    for how in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="another edit"):
            qkpatch.apply(plan, out, **how)
    assert objects_of(out) == before
    qkpatch.apply(plan, out, overwrite=True)
    assert qkpatch.verify(out, folder).ok
    assert CLAIM not in objects_of(out)


def test_what_another_machine_rounded_otherwise_is_made_again(
    folder: Path, memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = qkpatch.plan(folder, **EDIT), "memory://bucket/out"
    with monkeypatch.context() as patched:
        patched.setattr(Claim, "check_made", lambda *_: (_ for _ in ()).throw(StoreError("x")))
        with pytest.raises(StoreError):
            qkpatch.apply(plan, out)
    claim = f"/bucket/out/{CLAIM}"
    import fsspec

    said = json.loads(memory[claim].getvalue())
    said["done"]["model-00001-of-00003.safetensors"]["rows"] = "0" * 64
    fsspec.filesystem("memory").pipe_file(claim, json.dumps(said).encode())
    made = qkpatch.apply(plan, out, resume=True)
    assert (made.run.copied_by or {}) == {"resumed": 7, "upload": 1}


@pytest.mark.parametrize(
    "lie",
    [
        {"files": "abc"},
        {"files": ["../x"]},
        {"run": 1},
        {"done": {"x": {"size": 1}}},
        {"more": 1},
        {"files": None},
    ],
)
def test_a_claim_that_nobody_wrote_is_refused(memory: dict[str, Any], lie: dict[str, Any]) -> None:
    url = StoreUrl.parse("memory://bucket/out")
    assert url is not None
    made = Claim(open_store(url), "0" * 64, ("a", "b"))
    made.make()
    made.note("a", Done("5 bytes", 5, None, None))
    found = Claim.found(made.store)
    assert found is not None
    assert (found.files, found.done, found.run) == (made.files, made.done, made.run)
    said = json.loads(made.store.read(CLAIM) or b"")
    made.store.put(CLAIM, json.dumps({**said, **lie}).encode())
    with pytest.raises(UsageError, match="is none that qkpatch wrote"):
        Claim.found(made.store)


def test_two_runs_to_one_out(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = qkpatch.plan(folder, **EDIT), f"{place}/out"
    note, taken = Claim.note, []

    def raced(claim: Claim, *arguments: Any) -> None:
        note(claim, *arguments)
        if not taken:
            taken.append(True)
            with pytest.raises(UsageError, match="being written by another run"):
                qkpatch.apply(plan, out)
            taken.append(qkpatch.apply(plan, out, resume=True))

    monkeypatch.setattr(Claim, "note", raced)
    with pytest.raises(StoreError, match="another run has claimed"):
        qkpatch.apply(plan, out)
    assert objects_of(out)["qkpatch.json"] == taken[1].dumps().encode()
    assert qkpatch.verify(out, folder).ok


def test_a_run_whose_out_another_one_has_published_meanwhile_touches_nothing(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor_of, url = uploading.editor_of, f"{place}/out"
    make, made = objects.Objects.make, threading.Event()

    def told(self: objects.Objects, files: Any) -> None:
        make(self, files)
        made.set()

    def slow(*arguments: Any) -> Any:
        assert made.wait(60)  # of what stays, which is made meanwhile
        monkeypatch.setattr(uploading, "editor_of", editor_of)
        qkpatch.apply(qkpatch.plan(folder, **EDIT | {"alpha": 0.25}), url, overwrite=True)
        published.update(objects_of(url))
        return editor_of(*arguments)

    published: dict[str, bytes] = {}
    monkeypatch.setattr(objects.Objects, "make", told)
    monkeypatch.setattr(uploading, "editor_of", slow)
    with pytest.raises(StoreError, match="another run has claimed"):
        qkpatch.apply(qkpatch.plan(folder, **EDIT), url)
    assert published
    assert objects_of(url) == published
    assert qkpatch.verify(url, folder).ok


def test_an_object_that_another_program_changes_is_noticed(
    folder: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = open_store(StoreUrl.parse(place)).fs  # type: ignore[arg-type]
    root = place.partition("://")[2]
    plan, out = qkpatch.plan(folder, **EDIT), f"{place}/out"
    check = Claim.check_made
    for name in ("tokenizer.json", "stray.txt"):

        def meddled(own: Claim, made: Any, name: str = name) -> None:
            fs.pipe_file(f"{root}/out/{name}", b"[]")
            check(own, made)

        monkeypatch.setattr(Claim, "check_made", meddled)
        with pytest.raises(StoreError, match="not the one that this run made"):
            qkpatch.apply(plan, out, resume=True)
        assert "qkpatch.json" not in objects_of(out)
        fs.rm_file(f"{root}/out/{name}")


WRONG = [
    ("memory://bucket/tiny", {}, "OUT is SOURCE"),
    ("memory://bucket/tiny/out", {}, "OUT lies in SOURCE"),
    ("memory://bucket", {}, "OUT holds SOURCE"),
    ("https://host/out", {}, "cannot be at https"),
    ("sftp://host/out", {}, "cannot be at sftp"),
    ("memory://bucket/out.safetensors", {}, "OUT is a folder"),
    ("memory://bucket/out", {"link": True}, "no links"),
    ("memory://bucket/out", {"overwrite": True, "force": True}, "no links, and nothing there is replaced"),
    ("memory://bucket/full", {}, "qkpatch did not write this"),
    ("memory://bucket/full", {"overwrite": True}, "qkpatch did not write this"),
]


@pytest.mark.parametrize(("out", "how", "says"), WRONG)
def test_an_out_that_cannot_be_is_refused_and_nothing_is_touched(
    out: str, how: dict[str, Any], says: str, folder: Path, memory: dict[str, Any]
) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, data in files_of(folder).items():
        fs.pipe_file(f"bucket/tiny/{name}", data)
    fs.pipe_file("bucket/full/weights.bin", b"0")
    before = {path: file.getvalue() for path, file in memory.items()}
    writing = qkpatch.output.options.Writing(**how)
    with pytest.raises(UsageError, match=says):
        qkpatch.plan("memory://bucket/tiny", out=out, writing=writing, **EDIT)
    with pytest.raises(UsageError, match=says):
        qkpatch.apply(qkpatch.plan("memory://bucket/tiny", **EDIT), out, **how)
    assert {path: file.getvalue() for path, file in memory.items()} == before


def test_a_whole_out_is_never_replaced(folder: Path, place: str) -> None:
    out = f"{place}/out"
    qkpatch.apply(qkpatch.plan(folder, **EDIT), out)
    other = qkpatch.plan(folder, layers="0-1", modes=1)
    with pytest.raises(UsageError, match="not what this edit would make"):
        qkpatch.apply(other, out)
    with pytest.raises(UsageError, match="cannot replace it"):
        qkpatch.apply(other, out, overwrite=True)
    assert qkpatch.verify(out, folder).ok


@pytest.mark.parametrize(
    "arguments",
    [
        ("lora",),
        ("apply", "--push", "org/name"),
        ("apply", "--patch-only"),
        ("sweep", "--grid", "g.yaml"),
        ("revert",),
    ],
)
def test_a_command_that_writes_no_store_says_so(
    arguments: tuple[str, ...], folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "g.yaml").write_text("modes: [1]")
    done = run(arguments[0], folder, *arguments[1:], "-o", "s3://bucket/out")
    assert done.exit_code == 2
    assert not list(tmp_path.glob("s3:*"))
