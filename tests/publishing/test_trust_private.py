"""Of what was verified, only what is meant for the world is published.

One attack of a kind by default; its relatives are marked `stress`.
"""

# Fixtures are imported, and asked for by the names of parameters.
# ruff: noqa: F401, F811

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import build_tiny
from fake_hub import run_qkpatch
from published import World, made, refused, stress, sub_folder, world
from typer.testing import Result

from qkpatch.checkpoint.names import is_private
from qkpatch.publishing.private_files import Insisted

# -------- what is not meant for the world


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    """A directory with secrets in it, and links to some outside."""
    source = build_tiny(tmp_path / "leaky").path
    (source / ".env").write_text("HF_TOKEN=hf_secret")
    (sub_folder(source / ".ssh") / "id_ed25519").write_text("private")
    (sub_folder(source / "code" / "__pycache__") / "x.cpython-311.pyc").write_bytes(b"x")
    (source / "server.pem").write_text("private")
    (source / "special_tokens_map.json").write_text("{}")
    (tmp_path / "diary").write_text("dear diary")
    (source / "notes.txt").symlink_to(tmp_path / "diary")
    return source


def test_what_is_private_and_was_left_out_is_not_named(world: World, leaky: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    push = ("apply", leaky, "-o", out, "--exclude", "*.pem", "--push", "me/new")
    assert run_qkpatch(world.environment, *push).returncode == 0
    assert "server.pem" in (out / "qkpatch.json").read_text()  # here people are told
    (commit,) = world.hub.commits
    assert not [name for name, data in commit.files.items() if b"server.pem" in data]


def test_secrets_and_what_links_led_to_stay_here(world: World, leaky: Path, tmp_path: Path) -> None:
    push = ("apply", leaky, "-o", tmp_path / "edited", "--push", "me/new")
    result = run_qkpatch(world.environment, *push)
    assert result.returncode == 0, result.stderr
    (commit,) = world.hub.commits
    assert {*commit.files, *commit.large} == {
        "config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json", "qkpatch.json", "README.md",
    }  # fmt: skip
    assert ".env" not in commit.files["qkpatch.json"].decode()
    for name in (".env", ".ssh/id_ed25519", "server.pem", "notes.txt", "--include-hidden", "--include"):
        assert name in result.stderr


@pytest.mark.parametrize("name", ["sub/.GIT/config", "sub/.cache/x", "sub/.GIT", "a/.cache"])
def test_a_name_that_the_hub_refuses_is_refused_before_the_edit(
    world: World, leaky: Path, tmp_path: Path, name: str
) -> None:
    sub_folder((leaky / name).parent)
    (leaky / name).write_text("x")
    push = ("apply", leaky, "-o", tmp_path / "edited", "--push", "me/new")
    insisted = run_qkpatch(world.environment, *push, "--include-hidden")
    refused(world, insisted, 2, "no name for a file on the Hub")
    assert name in insisted.stderr
    assert not (tmp_path / "edited").exists()
    result = run_qkpatch(world.environment, *push)
    assert result.returncode == 0, result.stderr
    (commit,) = world.hub.commits
    assert name not in commit.files


@stress
def test_what_was_withheld_is_in_the_output_and_goes_along_where_somebody_insists(
    world: World, leaky: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run("apply", leaky, "-o", tmp_path / "edited").exit_code == 0
    more = ("--source", leaky, "--include", "notes.*", "--include-hidden")
    again = run_qkpatch(world.environment, "card", tmp_path / "edited", "--push", "me/more", *more)
    assert again.returncode == 0, again.stderr
    assert {".env", ".ssh/id_ed25519", "server.pem", "notes.txt"} <= world.hub.commits[0].files.keys()


@stress
@pytest.mark.parametrize("via", ["apply", "card", "copy of SOURCE", "second edit"])
def test_what_a_link_led_to_stays_here_on_every_way(
    world: World, leaky: Path, tmp_path: Path, run: Callable[..., Result], via: str
) -> None:
    out = tmp_path / "edited"
    if via != "apply":
        assert run("apply", leaky, "-o", out).exit_code == 0
    source = leaky
    if via == "copy of SOURCE":
        source = tmp_path / "copy"
        shutil.copytree(leaky, source)
    if via == "second edit":
        source, out = out, tmp_path / "again"
    if via in ("apply", "second edit"):
        result = run_qkpatch(world.environment, "apply", source, "-o", out, "--push", "me/new")
    else:
        result = run_qkpatch(world.environment, "card", out, "--push", "me/new", "--source", source)
    assert result.returncode == 0, result.stderr
    assert "notes.txt" not in world.hub.commits[0].files
    assert "notes.txt" in result.stderr


@stress
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("reshard", [(), ("--max-shard-size", "4KB")])
def test_a_model_that_lies_elsewhere_is_published_on_demand_alone(
    world: World, tmp_path: Path, name: str, reshard: tuple[str, ...]
) -> None:
    source, out = build_tiny(tmp_path / "linked").path, tmp_path / "edited"
    (source / name).rename(tmp_path / "far")
    (source / name).symlink_to(tmp_path / "far")
    push = ("apply", source, "-o", out, "--push", "me/new", *reshard)
    result = run_qkpatch(world.environment, *push)
    refused(world, result, 2, "--include")
    assert not out.exists()
    insisted = run_qkpatch(world.environment, *push, "--include", "config.json", "--include", "*.safetensors")
    assert insisted.returncode == 0, insisted.stderr


@stress
def test_a_card_that_is_a_link_out_of_source_is_not_quoted(world: World, tmp_path: Path) -> None:
    source = build_tiny(tmp_path / "linked").path
    (tmp_path / "diary").write_text("dear diary")
    (source / "README.md").symlink_to(tmp_path / "diary")
    push = ("apply", source, "-o", tmp_path / "edited", "--push", "me/new")
    assert run_qkpatch(world.environment, *push).returncode == 0
    assert b"dear diary" not in world.hub.commits[0].files["README.md"]


PRIVATE = [
    ".env", ".netrc", ".ssh/config", "a/.git/config", ".gitignore", "a/.gitattributes", "__pycache__/a", "a.pyc",
    "A.PYC", "id_rsa", "ID_RSA.pub", "id_ed25519_work", "x.pem", "x.key", "x.p12", "x.pfx", "x.kdbx", "_netrc",
    "credentials", "credentials.json", "aws_credentials", "secrets.yaml", "Secrets.toml", "token", "token.txt",
    "TOKEN", "hf_token", "hf_token.txt", "client_secret_1.json", "service_account.json",
    "service_account-prod.json", "keys/x.key", "prod.env", "my_private_key", "api_key.txt", "secrets/a.txt", "token/a",
]  # fmt: skip


@stress
@pytest.mark.parametrize("name", PRIVATE)
def test_private_by_name(name: str) -> None:
    assert is_private(name)
    assert Insisted().withholds(name, ()) == "--include-hidden"
    assert Insisted(hidden=True).withholds(name, ()) is None
    assert Insisted(names=("*",)).withholds(name, ()) == "--include-hidden"


PUBLIC = [
    ".gitattributes", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "tokenization_qwen.py", "tokens.txt", "token_type.json", "vocab.json", "merges.txt",
    "config.json", "model.safetensors", "model.safetensors.index.json", "modeling_key.py", "keyboard.json",
    "monkey.txt", "LICENSE", "generation_config.json", "chat_template.jinja", "environment.yml", "secretary.json",
    "keypoints.json", "x.keys.json", "sub/preprocessor_config.json", "README.md",
]  # fmt: skip


@stress
@pytest.mark.parametrize("name", PUBLIC)
def test_not_private_by_name(name: str) -> None:
    assert not is_private(name)


@stress
def test_a_published_copy_without_what_was_withheld_is_proved(
    world: World, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "source").mkdir()
    source = build_tiny(tmp_path / "source" / "it").path
    (source / ".gitignore").write_text("x")
    out = tmp_path / "edited"
    assert run_qkpatch(world.environment, "apply", source, "-o", out, "--push", "me/new").returncode == 0
    (commit,) = world.hub.commits
    copy = sub_folder(tmp_path / "downloaded")
    for name, data in commit.files.items():
        (copy / name).write_bytes(data)
    for name, digest in commit.large.items():
        (copy / name).write_bytes(world.hub.uploads[digest])
    result = run("verify", copy, "--source", source)
    assert result.exit_code == 0, result.stdout
    assert ".gitignore" in result.stdout
    (copy / "tokenizer.json").unlink()
    assert run("verify", copy, "--source", source).exit_code == 1
