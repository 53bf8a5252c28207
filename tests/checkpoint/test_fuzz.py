"""The fuzzer's mutators without the fuzzer: a fixed seed, a few seconds. `make fuzz` is the long run."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter

import pytest
from conftest import REPO
from test_header import RECENT, needs_recent

from qkpatch.checkpoint.header import Header

sys.path.insert(0, str(REPO))

from scripts.fuzz import targets as fuzz_targets

COUNTS = {
    "header": 20_000,
    "recipe": 1_500,
    "settings": 6_000,
    "manifest": 4_000,
    "index": 3_000,
    "config": 3_000,
}


def test_every_target_is_run() -> None:
    assert COUNTS.keys() == fuzz_targets.TARGETS.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", COUNTS)
def test_only_typed_errors_leave_a_reader_and_verdicts_agree(name: str) -> None:
    if name == "header" and not RECENT:
        pytest.skip("compares with safetensors 0.8 or later")
    for content in fuzz_targets.generate(fuzz_targets.TARGETS[name], 1, COUNTS[name]):
        fault = fuzz_targets.run_one(name, content)
        assert fault is None, (fault, content)


@pytest.mark.parametrize("name", COUNTS)
def test_the_seeds_are_taken_as_they_are(name: str) -> None:
    for content in fuzz_targets.TARGETS[name].seeds():
        assert fuzz_targets.run_one(name, content) is None or (name == "header" and not RECENT)


@pytest.mark.parametrize("name", COUNTS)
def test_the_same_seed_makes_the_same_inputs(name: str) -> None:
    first, second, other = (
        fuzz_targets.generate(fuzz_targets.TARGETS[name], seed, 200) for seed in (5, 5, 6)
    )
    assert first == second != other


@pytest.mark.long
def test_the_mutator_reaches_valid_files_and_every_kind_of_refusal() -> None:
    kinds: Counter[str] = Counter()
    for content in fuzz_targets.generate(fuzz_targets.TARGETS["header"], 2, 12_000):
        verdict = fuzz_targets.our_verdict(content)
        kinds["valid" if isinstance(verdict, Header) else verdict.what] += 1
    assert kinds["valid"] > 600
    for words in (
        "no safetensors file", "the file is truncated: its header takes", "does not begin with", "is not valid JSON",
        "surrogate pair", "is no finite number", "appears twice", "is not a JSON object", "is not a string",
        "dtype is missing", "shape is missing", "data_offsets is missing", "end before they begin", "passes 2^64",
        "its data_offsets hold", "nests too deeply", "it begins at byte", "its header declares", "no tensor owns",
    ):  # fmt: skip
        assert any(words in kind for kind in kinds), words


# -------- the judge itself: it sees what is wrong, and knows what is documented


def file_of(text: str, data: bytes = b"xy") -> bytes:
    return fuzz_targets.framed(text, data)


GOOD = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


@pytest.mark.parametrize(
    ("content", "documented"),
    [
        (file_of(f'{{"a":{GOOD},"a":{GOOD}}}'), True),
        (file_of(f' {{"a":{GOOD}}}'), True),
        (file_of('{"a":["U8",[2],[0,2]]}'), True),
        (file_of('{"a":{"dtype":{"U8":null},"shape":[2],"data_offsets":[0,2]}}'), True),
        (file_of(f'{{"a":{GOOD[:-1]},"x":1.5e308}}}}'), True),
        (file_of(f'{{"a":{GOOD}}}'), False),
        (file_of(f'{{"a":{GOOD},"b":{GOOD}}}'), False),
    ],
)
def test_what_is_documented_as_stricter(content: bytes, documented: bool) -> None:
    assert fuzz_targets.is_documented(content) is documented


@pytest.fixture(scope="module")
def inputs() -> list[bytes]:
    return fuzz_targets.generate(fuzz_targets.TARGETS["header"], 3, 20_000)


def nothing(*_: object, **__: object) -> None:
    """A check that lets all pass."""


@pytest.mark.long
@needs_recent
@pytest.mark.parametrize(
    ("part", "weaker"),
    [
        ("_check_coverage", nothing),
        ("_check_size", nothing),
        ("_check_undefined", nothing),
        ("half_surrogate", nothing),
        ("_integer", int),
        ("_real", float),
        ("_unique", dict),
        ("_are_naturals", lambda value: isinstance(value, list)),
        ("_MAX_DEPTH", 126),
        ("_U64_MAX", 2**65),
    ],
)
def test_a_parser_that_checks_less_or_other_things_is_found_out(
    part: str, weaker: object, inputs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"qkpatch.checkpoint.header.{part}", weaker)
    assert any(fuzz_targets.run_one("header", content) for content in inputs)


@pytest.mark.long
@needs_recent
def test_a_parser_that_knows_a_dtype_wrongly_is_found_out(
    inputs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fuzz_targets.DTYPE_BITS, "F8_E8M0", 16)
    assert any(fuzz_targets.run_one("header", content) for content in inputs)


def test_mutated_json_is_mostly_still_json() -> None:
    rng = random.Random(4)
    (seed,) = fuzz_targets.index_seeds()
    parsed = 0
    for _ in range(500):
        try:
            json.loads(fuzz_targets.mutate_json(seed, rng))
            parsed += 1
        except (ValueError, RecursionError):
            continue
    assert parsed > 200
