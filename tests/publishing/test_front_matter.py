"""The head of a model card: what is inherited of it, to the letter, and what is set anew."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cards import BASE_CARD, base_model, card_over, parts, verified
from conftest import Tiny
from typer.testing import Result

from qkpatch.publishing.front_matter import FrontMatter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return base_model(tmp_path_factory.mktemp("base"))


def test_front_matter_is_kept_but_for_what_is_set_and_dropped() -> None:
    matter = FrontMatter.of(BASE_CARD)
    assert matter.text == "\n# Base\n\nIt is *good*. --- or so.\n"
    changed = matter.changed({"base_model": "org/base", "tags": ["a", "no", "1.5"]}, ["model-index"])
    read = yaml.safe_load(changed)
    assert read == {
        "license": "other",
        "license_name": "tongue-twister",
        "language": ["en"],
        "pipeline_tag": "image-text-to-text",
        "base_model": "org/base",
        "tags": ["a", "no", "1.5"],
    }
    assert "license_name: tongue-twister  # kept too\n" in changed
    assert changed.startswith("# kept\n")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("tags: [vision, 'chat']", ["vision", "chat"]),
        ("tags: [vision,\n  chat]\nx: 1", ["vision", "chat"]),
        ("tags:\n- vision # yes\n- \"chat\"\nx: 1", ["vision", "chat"]),
        ("tags:\n  - vision\n", ["vision"]),
        ("tags: vision", ["vision"]),
        ("tags: [null, ~, 2024, no]", ["2024", "no"]),
        ("{license: mit, 'tags': [vision]}", ["vision"]),
        ("tags:\n", []),
        ("tags: [{a: b}]", []),
        ("x: 1", []),
        ("", []),
    ],
)  # fmt: skip
def test_lists_are_read_in_each_of_their_forms(block: str, expected: list[str]) -> None:
    assert FrontMatter.of(f"---\n{block}\n---\n").listed("tags") == expected


@pytest.mark.parametrize(
    "card",
    [
        "# no front matter\n",
        "",
        "--- no\n---\n",
        "---\nunclosed\n",
        "---\n\nTwo words: three\n",
        "---\nbetween two rules\n---\n",
    ],
)
def test_a_card_without_front_matter_is_all_text(card: str) -> None:
    assert FrontMatter.of(card) == FrontMatter(card)


@pytest.mark.parametrize(
    ("card", "keys", "text"),
    [
        ("---\r\na: 1\r\n---\r\ntext", ["a"], "text"),
        ("---\n---\ntext", [], "text"),
        ("\ufeff---\na: 1\n---\ntext", ["a"], "text"),
        ("\ufefftext", [], "text"),
        ("\n\n---  \na: 1\n---\t\ntext", ["a"], "text"),
        ("---\na: 1\n...\nb: 2\n---\ntext", ["a"], "b: 2\n---\ntext"),
        ("---\na: 1\n---", ["a"], ""),
    ],
)
def test_front_matter_ends_where_it_ends(card: str, keys: list[str], text: str) -> None:
    matter = FrontMatter.of(card)
    assert (list(matter.entries), matter.text) == (keys, text)


FIGURES = "[{name: base, results: [{task: {type: x}}]}]"


@pytest.mark.parametrize(
    "block",
    [
        f"license: mit\nmodel-index: {FIGURES}\n",
        f'license: mit\n"model-index": {FIGURES}\n',
        f"license: mit\n'model-index' : {FIGURES}\n",
        f'license: mit\n"model\\x2dindex": {FIGURES}\n',
        f"license: mit\n? model-index\n: {FIGURES}\n",
        f"{{license: mit, model-index: {FIGURES}}}\n",
        f"{{license: mit,\n model-index: {FIGURES}}}\n",
        f"  license: mit\n  model-index: {FIGURES}\n",
        f"license: mit\n<<: {{model-index: {FIGURES}}}\n",
        f"license: mit\n...\nmodel-index: {FIGURES}\n",
        f"license: mit\nmodel-index: {FIGURES}\nmodel-index: {FIGURES}\n",
    ],
)
def test_the_bases_figures_are_inherited_in_no_spelling(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], block: str
) -> None:
    data, _ = parts(card_over(f"---\n{block}---\n# Base\n", base, tmp_path, run))
    assert data == {"license": "mit", "tags": ["qkpatch"]}


@pytest.mark.parametrize(
    ("block", "kept"),
    [
        ("base_model: /home/me/llama", {}),
        ("base_model: ./llama", {}),
        ("base_model: [~/llama, org/older, null]", {"base_model": ["org/older"]}),
        ("base_model: org/older  # yes\nbase_model_relation: merge", {"base_model": "org/older"}),
        ("base_model: gpt2", {"base_model": "gpt2"}),
        ("datasets: [null]", {}),
        ("datasets:\n- null\n- org/data\n-", {"datasets": ["org/data"]}),
        ("license: null", {}),
        ("license_link: /home/me/LICENSE\nthumbnail: file:///home/me/x.png", {}),
        (
            "license_link: ~/LICENSE\nthumbnail: 'C:\\me\\x.png'\nlanguage: [en, /home/me/x]",
            {"language": ["en"]},
        ),
        (
            "license_link: LICENSE\nthumbnail: https://h/x.png",
            {"license_link": "LICENSE", "thumbnail": "https://h/x.png"},
        ),
        ("datasets: [{name: x}]\nbase_model: {a: b}", {}),
        ("a: &x [1, *x]\nmodel-index: &y [base]\nb: *y\nc: &z R&D", {"b": ["base"], "c": "R&D"}),
        ("language: [no, en, ~]", {"language": ["no", "en"]}),
        ("widget: [{text: null}]\ndate: 2024-05-01\nx: 010\n", {"widget": [{"text": None}], "x": 8}),
        ("language: no", {"language": False}),  # as it was written: the Hub reads another YAML
    ],
)
def test_what_the_hub_rejects_is_left_out_and_what_it_knows_nothing_of_stays(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], block: str, kept: dict[str, Any]
) -> None:
    card = card_over(f"---\n{block}\n---\n# Base\n", base, tmp_path, run)
    data, _ = parts(card)
    assert data.pop("tags") == ["qkpatch"]
    for key in ("date", "a"):  # which is a list in itself
        data.pop(key, None)
    assert data == kept
    assert ("date: 2024-05-01\nx: 010\n" in card) == ("date" in block)


def test_a_head_that_cannot_be_read_is_told_and_kept(
    base: Tiny, tmp_path: Path, run: Callable[..., Result]
) -> None:
    card = card_over("---\nlicense: mit: x\n---\n# Base\n", base, tmp_path, run)
    assert parts(card)[0] == {"tags": ["qkpatch"]}
    assert "The head of the base model's card is not YAML: mapping values are not allowed here" in card
    assert card.endswith("as it was. -->\n\n---\nlicense: mit: x\n---\n# Base\n")


@pytest.mark.parametrize(
    "readme",
    ["---\nlicense: mit\ntags: [x]\n# Base\n", "---\n# head\n\nlicense: mit\n", "---\r\nlicense: mit"],
)
def test_a_head_without_an_end_is_told_and_verify_knows_the_card(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], readme: str
) -> None:
    card = card_over(readme, base, tmp_path, run)
    assert parts(card)[0] == {"tags": ["qkpatch"]}
    assert "card is not closed by a second ---: no license is inherited.\n" in card
    assert run("card", tmp_path / "out", "--write").exit_code == 0
    verified(run, tmp_path / "out", tmp_path / "source")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_card_in_whichever_unicode_keeps_license_and_tags(
    base: Tiny, tmp_path: Path, run: Callable[..., Result], encoding: str
) -> None:
    card = card_over("---\nlicense: mit\ntags: [a]\n---\n# Bäse\n".encode(encoding), base, tmp_path, run)
    data, text = parts(card)
    assert data == {"license": "mit", "tags": ["a", "qkpatch"]}
    assert text.endswith("as it was. -->\n\n# Bäse\n")


@pytest.mark.parametrize(
    "text",
    ["tags: [a{}b]", "tags:{}\n- a", "- {}x", "x: '{}'", "[{}", "{}"],
)
@pytest.mark.parametrize("filler", [" ", "- ", "a\n", "#\n", "[", "a: 1\n"])
def test_the_time_of_reading_a_head_grows_with_it_alone(text: str, filler: str) -> None:
    def seconds(n: int) -> float:
        card = f"---\n{text.format(filler * (n // len(filler)))}\n---\n"
        begun = time.process_time()
        FrontMatter.of(card)
        return time.process_time() - begun

    # What else runs may be in the way once.
    assert any(seconds(20_000) < 3 * seconds(10_000) + 0.1 for _ in range(2))
