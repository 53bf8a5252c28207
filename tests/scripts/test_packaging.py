"""What is built from the repository besides the package: the site, the image, the release, what PyPI shows."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPO
from packaging.version import Version

if str(REPO) not in sys.path:
    sys.path.insert(0, str(REPO))

from scripts import floors, release, site

tomllib = pytest.importorskip("tomllib")  # Python 3.11

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))
SITE = tomllib.loads((REPO / "zensical.toml").read_text("utf-8"))["project"]
DOCKERFILE = (REPO / "Dockerfile").read_text("utf-8").replace("\\\n", " ")


def leaves(entries: list[dict[str, Any]]) -> list[str]:
    """The pages of a navigation, in its order."""
    values = [value for entry in entries for value in entry.values()]
    return [page for value in values for page in (leaves(value) if isinstance(value, list) else [value])]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(leaves(SITE["nav"])) == [page.relative_to(REPO).as_posix() for page in site.pages()]


def test_the_site_has_all_that_its_pages_link_to(tmp_path: Path) -> None:
    site.lay_out(tmp_path)
    laid = {
        path.relative_to(tmp_path / "pages") for path in (tmp_path / "pages").rglob("*") if path.is_file()
    }
    assert {page.relative_to(REPO) for page in site.pages()} <= laid
    assert Path("docs/spectrum.svg") in laid
    assert len(laid) < 100


def test_a_link_that_no_site_could_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "REPO", tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / ".hidden.yml").touch()
    for link in ("folder", "gone.md", "../outside.md", ".hidden.yml"):
        (tmp_path / "README.md").write_text(f"[a link]({link})")
        with pytest.raises(FileNotFoundError, match="no file that the site can show"):
            site.lay_out(tmp_path / "build")


def copied() -> list[str]:
    """What the image takes from the repository."""
    lines = [shlex.split(line) for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE)]
    return [source for line in lines if not line[0].startswith("--from") for source in line[:-1]]


def test_the_image_copies_what_is_there_and_gets_nothing_else() -> None:
    rules = (REPO / ".dockerignore").read_text().splitlines()
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    assert sorted(let_in) == sorted(copied())
    assert all((REPO / name).exists() for name in copied())
    needed = {PROJECT["project"]["license-files"][0], "README.md", "pyproject.toml", "configs", "qkpatch"}
    assert needed <= set(copied())


def test_the_image_is_of_a_python_that_is_supported_pinned_and_nobody_is_root_in_it() -> None:
    bases = set(re.findall(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.MULTILINE))
    assert len(bases) == 1
    assert f"Programming Language :: Python :: {bases.pop()}" in PROJECT["project"]["classifiers"]
    installs = re.findall(r"pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in line for line in installs)
    assert re.search(r"^torch==", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    last = DOCKERFILE.rpartition("FROM ")[2]
    assert re.search(r"^USER [1-9]\d*", last, re.MULTILINE)
    assert 'ENTRYPOINT ["qkpatch"]' in last
    assert list(PROJECT["project"]["scripts"]) == ["qkpatch"]


def test_what_pypi_shows_leads_to_the_tag() -> None:
    readme = (REPO / "README.md").read_text("utf-8")
    rules = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    shown = readme
    for rule in rules:
        shown = re.sub(rule["pattern"], rule["replacement"], shown)
    place = PROJECT["project"]["urls"]["Source"]
    links, before = (re.findall(r"\]\(([^)\s]+)\)", text) for text in (shown, readme))
    assert len(links) == len(before)
    for link, was in zip(links, before, strict=True):
        kind = "raw" if was.endswith((".svg", ".png")) else "blob"
        assert link == (
            was if "://" in was or was.startswith("#") else f"{place}/{kind}/v$HFPR_VERSION/{was}"
        )


def test_a_release_is_told_what_does_not_agree(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(REPO / name, tmp_path)
    ours = PROJECT["project"]["version"]
    assert list(release.disagreements(f"v{ours}", tmp_path)) == []
    assert len(list(release.disagreements("v99.0.0", tmp_path))) == 3
    changelog = tmp_path / "CHANGELOG.md"
    text = changelog.read_text("utf-8")
    assert "\n## [Unreleased]\n" in text
    changelog.write_text(text.replace(f"## [{ours}] - 2", f"## [{ours}] - 3"), "utf-8")
    (told,) = release.disagreements(f"v{ours}", tmp_path)
    assert told.startswith("CHANGELOG.md")
    release.name_place("https://forge.example/them/qkpatch/", tmp_path)
    named = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))
    assert set(named["project"]["urls"].values()) >= {"https://forge.example/them/qkpatch"}
    assert "OWNER/" not in (tmp_path / "pyproject.toml").read_text("utf-8")


def test_the_release_publishes_without_a_token_and_runs_no_text_as_a_command() -> None:
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "release.yml").read_text())
    assert workflow["permissions"] == {}
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    commands = [step["run"] for step in build["steps"] if "run" in step]
    assert not [command for command in commands if "${{" in command]
    assert "secrets." not in str(workflow)
    for script in re.findall(r"scripts[./]\w+(?:\.sh)?", " ".join(commands)):
        assert (REPO / (script if script.endswith(".sh") else script.replace(".", "/") + ".py")).exists(), (
            script
        )


def test_what_tests_every_change_may_only_read_and_runs_what_there_is() -> None:
    folder = REPO / ".github" / "workflows"
    workflow = yaml.safe_load((folder / "test.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert not [job for job in workflow["jobs"].values() if "permissions" in job]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert {step["uses"] for step in steps if "uses" in step} < set(
        re.findall(r"uses: (\S+)", (folder / "release.yml").read_text())
    )
    commands = {step["run"] for step in steps if "run" in step}
    assert "bash .ci/run" in commands
    made = {word for command in commands for word in re.findall(r" ([a-z][a-z-]*)(?= |$)", command)}
    assert made == {"check", "test", "test-long", "test-portable", "test-stores", "stress"}
    assert made <= set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))


def test_the_source_archive_has_what_the_pages_and_the_tests_are_made_of() -> None:
    kept = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    top = {path.name for path in REPO.iterdir()} - {
        ".git",
        ".cache",
        ".venv",
        "build",
        "dist",
        "out",
        ".gitignore",
    }
    mine = {name for name in top if not name.startswith((".ruff", ".mypy", ".pytest", ".hypothesis"))}
    missing = {n for n in mine if not any(fnmatch.fnmatch(f"/{n}", pattern) for pattern in kept)}
    assert missing <= {"pyproject.toml"}  # which is always in it


@pytest.mark.floor
def test_the_versions_that_are_tried_are_those_that_are_allowed() -> None:
    oldest = {one.partition("==")[0]: one.partition("==")[2] for one in floors.floors()}
    assert oldest.keys() >= {"typer", "numpy", "safetensors", "huggingface-hub", "pyyaml", "rich"}
    for one in floors.allowed():
        found = Version(version(one.name))
        assert found in one.specifier, one
        if os.environ.get("QKPATCH_FLOOR") == "floor":
            assert found == Version(oldest[one.name]), one
