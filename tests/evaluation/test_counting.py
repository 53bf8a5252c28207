"""Annotations, what captions name, what is asked, and statistics with known answers; no model."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qkpatch.errors import QKPatchError, RecipeError, UsageError
from qkpatch.evaluation.annotations import Annotations, read_annotations
from qkpatch.evaluation.chair import CaptionScore, chair_columns, figures
from qkpatch.evaluation.comparison import divergence
from qkpatch.evaluation.measure import KINDS_KEPT
from qkpatch.evaluation.pope import KINDS, questions, yes_no_columns
from qkpatch.evaluation.records import Protocol, Store, of_parts
from qkpatch.evaluation.search import LOGGED
from qkpatch.evaluation.statistics import McNemar, excess_over_curve, figures_beside, mcnemar, paired
from qkpatch.evaluation.vocabulary import Vocabulary, whole_sentences

# -------- what a caption names


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("A cup and two cups.", ["cup", "cup"]),
        ("a hot dog beside a dog", ["hot dog", "dog"]),
        ("HOT-DOGS!", ["hot dog"]),
        ("cupboards, doggy, catalogue", []),  # whole words
        ("a mug of coffee, a coffee cup", ["cup", "cup"]),
        ("the dog's bowl", ["dog"]),
        ("people, a woman, three men and a fireman", ["person", "person", "person"]),
        ("knives, wolves and ponies on two buses", ["knife", "wolf", "pony", "bus"]),
        ("boys on skis", ["boy", "skis"]),
        ("one ski", ["skis"]),
        ("wine glasses, glasses", ["wine glass", "glass"]),
        ("", []),
    ],
)
def test_objects_are_named_by_whole_words_plurals_and_synonyms(
    caption: str, named: list[str], tmp_path: Path
) -> None:
    (tmp_path / "words.yaml").write_text("cup: [mug, Coffee Cup]\nperson: [man, woman]\n")
    objects = {"cup", "dog", "hot dog", "person", "knife", "wolf", "pony", "bus", "boy", "skis", "wine glass", "glass",
               "cat"}  # fmt: skip
    assert Vocabulary.of(objects, tmp_path / "words.yaml").mentions(caption) == named


def test_what_is_called_so_itself_goes_before_a_plural() -> None:
    words = Vocabulary.of({"glass", "glasses"})
    assert words.mentions("a glass, some glasses") == ["glass", "glasses"]


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("zebra: [stripes]", UsageError, "no synonym of an object"),
        ("cup: []", UsageError, "no synonym of an object"),
        ("{}", UsageError, "no synonym of an object"),
        ("[cup]", RecipeError, "expected a mapping"),
        ("cup: mug", RecipeError, "expected list"),
        ("cup: [3]", RecipeError, "expected str"),
        ("cup: ['...']", RecipeError, "no word"),
        ("cup: [mug]\ndog: [mug]", RecipeError, "another object already"),
        ("cup: [dog]", RecipeError, "another object already"),
        ("cup: [a", RecipeError, "not valid YAML"),
        ("cup: &a [mug]\ndog: *a", RecipeError, "aliases"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(
    text: str, kind: type[QKPatchError], says: str, tmp_path: Path
) -> None:
    (tmp_path / "words.yaml").write_text(text)
    with pytest.raises(kind, match=says) as caught:
        Vocabulary.of({"cup", "dog"}, tmp_path / "words.yaml")
    assert caught.value.where


def test_an_unfinished_last_sentence_is_cut_off() -> None:
    assert whole_sentences("A cup. A dog and a") == "A cup."
    assert whole_sentences("At 3.5 metres a dog! Then") == "At 3.5 metres a dog!"
    assert whole_sentences("A dog and a") == "A dog and a"


# -------- annotations


def folder(tmp_path: Path, *names: str) -> Path:
    pictures = tmp_path / "pictures"
    for name in names:
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(b"")
    return pictures


def coco(**more: Any) -> dict[str, Any]:
    outline = {"segmentation": [[1.5, 2, 3e1], [4]], "bbox": [0.0, 1, 2, 3], "area": 1.0, "iscrowd": 0}
    crowd = {"image_id": 7, "category_id": 2, "segmentation": {"counts": [1, 2], "size": [3, 4]}}
    return {
        "info": {},
        "categories": [{"id": 1, "name": "Cup"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "cat"}],
        "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}, {"id": 9, "file_name": "c.jpg"}],
        "annotations": [{**outline, "image_id": 7, "category_id": 1, "id": 1}, {"id": 2, **crowd},
                        {"image_id": 8, "category_id": 2, "id": 3, **outline}],
        **more,
    }  # fmt: skip


@pytest.mark.parametrize("indent", [None, 1])
def test_cocos_instances_and_lines_say_the_same(indent: int | None, tmp_path: Path) -> None:
    pictures = folder(tmp_path, "a.jpg", "b.jpg", "other.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(coco(), indent=indent))
    read = read_annotations(tmp_path / "instances.json", pictures)
    assert read.present == {"a.jpg": frozenset({"cup", "dog"}), "b.jpg": frozenset({"dog"})}
    assert (read.names, read.left_out) == ({"cup", "dog", "cat"}, 1)
    lines = [{"image": "b.jpg", "objects": ["dog"]}, {"image": "a.jpg", "objects": ["Cup", " dog", "dog"]}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    again = read_annotations(tmp_path / "lines.jsonl", pictures)
    assert again.present == read.present
    assert again.digest == read.digest
    assert again.names == {"cup", "dog"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no object"),
        ("nonsense", "not valid JSON"),
        ("[1]", "which objects"),
        ('{"image": "a.jpg"}', "which objects"),
        ('{"image": "a.jpg", "objects": "cup"}', "without a list"),
        ('{"image": "a.jpg", "objects": []}', "no object"),
        ('{"image": "a.jpg", "objects": [3]}', "which objects"),
        ('{"image": "a.jpg", "objects": [" "]}', "without a name"),
        ('{"image": ["a.jpg"], "objects": ["cup"]}', "which objects"),
        ('{"image": ":text", "objects": ["cup"]}', "begins with a colon"),
        ('{"image": "a.jpg", "objects": ["cup"]}\n{"image": "a.jpg", "objects": ["cup"]}', "second time"),
        ('{"image": "z.jpg", "objects": ["cup"]}', "other pictures: it names z.jpg"),
        ('{"image": "../secret.jpg", "objects": ["cup"]}', "other pictures"),
        (json.dumps(coco(images=[])), "which objects"),
        (json.dumps(coco(categories=[])), "which objects"),
        (json.dumps({**coco(), "annotations": 3}), "which objects"),
        (json.dumps(coco(categories=[{"id": 1, "name": 3}])), "which objects"),
    ],
)
def test_annotations_that_are_none_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"")
    (tmp_path / "objects.json").write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        read_annotations(tmp_path / "objects.json", folder(tmp_path, "a.jpg"))
    assert "objects.json" in str(caught.value.where)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["objects.jsonl", "pictures"])
def test_files_that_are_not_there_are_said(name: str, tmp_path: Path) -> None:
    (tmp_path / "objects.jsonl").write_text('{"image": "a.jpg", "objects": ["cup"]}')
    pictures = folder(tmp_path, "a.jpg")
    places = {"objects.jsonl": tmp_path / "objects.jsonl", "pictures": pictures}
    places[name] = tmp_path / "nowhere"
    with pytest.raises(QKPatchError, match="nowhere"):
        read_annotations(places["objects.jsonl"], places["pictures"])


def test_pictures_are_drawn_with_a_seed() -> None:
    every = Annotations(Path(), {f"{i}": frozenset({"cup"}) for i in range(30)}, frozenset({"cup"}))
    once, again, other = (every.drawn(9, seed).present for seed in (0, 0, 1))
    assert once == again != other
    assert list(once) == sorted(once)
    assert every.drawn(None, 0) is every
    with pytest.raises(UsageError, match="fewer than 31"):
        every.drawn(31, 0)


# -------- POPE


def test_questions_are_balanced_and_of_three_kinds() -> None:
    there = [{"cup", "fork"}] * 5 + [{"cup", "dog"}] * 3 + [{"tree"}] * 4 + [{"cup"}]
    names = frozenset({"cup", "fork", "dog", "tree", "zebra"})
    among = Annotations(Path(), {f"{i:02}": frozenset(t) for i, t in enumerate(there)}, names)
    asked = questions(among, 2, 0)
    assert asked == questions(among, 2, 0)
    assert {name: of["random"] for name, of in asked.items()} != {
        name: of["random"] for name, of in questions(among, 2, 1).items()
    }
    for name, of in asked.items():
        present = among.present[name]
        assert set(of["present"]) <= present
        for kind in KINDS:
            assert len(of[kind]) == len(set(of[kind])) == len(of["present"])
            assert not present & set(of[kind])
    assert asked["12"]["popular"] == ("fork",)  # five times, of what is not there
    assert asked["08"]["popular"] == ("cup",)
    assert asked["00"]["adversarial"] == ("dog", "tree")  # a dog comes with cups, a tree alone
    assert questions(among.only(["12"]), 2, 0)["12"]["random"]


def test_yes_and_no_by_hand() -> None:
    columns = yes_no_columns([[(0.9, True), (0.8, False)], [(0.2, True), (0.5, False)], []])
    assert figures(columns) == {"accuracy": 2 / 4, "f1": 2 * 1 / (2 * 1 + 1 + 1), "yes": 2 / 4}


def test_questions_take_the_article_that_they_need() -> None:
    assert Protocol().asked("apple").startswith("Is there an apple in")
    assert Protocol().asked("dog").startswith("Is there a dog in")
    assert Protocol(question="exists {object}").asked("apple") == "exists apple"


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"prompt": " "}, "--prompt"),
        ({"question": "is it there?"}, "--question"),
        ({"questions": -1}, "--questions"),
        ({"max_new_tokens": 0}, "--max-new-tokens"),
        ({"max_new_tokens": True}, "--max-new-tokens"),
        ({"sample": 0}, "--sample"),
        ({"sample_seed": 0.5}, "--sample-seed"),
    ],
)
def test_a_protocol_that_is_none_is_refused(given: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        Protocol(**given)
    assert caught.value.where == where


# -------- statistics


@pytest.mark.floor
def test_a_paired_interval_is_that_of_the_mean_difference() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 400))
    ones = np.ones(400)
    (found,) = paired(np.stack([a, ones], -1)[None], np.stack([b, ones], -1)[None])
    error = 1.96 * (a - b).std() / math.sqrt(400)
    assert found.estimate == pytest.approx((a - b).mean())
    assert found.low == pytest.approx((a - b).mean() - error, abs=0.1 * error)
    assert found.high == pytest.approx((a - b).mean() + error, abs=0.1 * error)


def test_the_same_answers_differ_by_nothing() -> None:
    same = chair_columns([CaptionScore(3, i % 2, 1, 2) for i in range(20)])["chair_s"][None]
    (found,) = paired(same, same)
    assert (found.estimate, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_mcnemars_exact_test() -> None:
    a, b = [True] * 10 + [False] * 2 + [True] * 30, [False] * 10 + [True] * 2 + [True] * 30
    # Twice the binomial tail of 2 of 12: statsmodels' mcnemar(exact=True) gives 0.03857421875.
    assert mcnemar(a, b) == McNemar(10, 2, 0.03857421875)
    assert mcnemar(a, a) == McNemar(0, 0, 1.0)
    assert mcnemar([True] * 5000, [False] * 5000).p == pytest.approx(0, abs=1e-300)
    begun = time.process_time()
    assert mcnemar([True, False] * 20_000, [False, True] * 20_000) == McNemar(20_000, 20_000, 1.0)
    assert time.process_time() - begun < 3


def test_a_setting_on_the_curve_is_no_better_than_it() -> None:
    rng = np.random.default_rng(0)
    ones = np.ones(300)
    points = [np.stack([np.stack([rng.random(300) < 0.5 * k / 4, ones], -1), np.stack([ones * k / 4, ones], -1)])
              for k in range(5)]  # fmt: skip
    curve = np.stack([points[2], *points]).astype(float)
    assert excess_over_curve(curve).estimate == 0
    curve[0, 0, :, 0] = 0  # nothing made up at the recall of the middle
    assert excess_over_curve(curve).high < 0


def test_divergence_of_all_tokens_is_exact_and_of_some_is_a_lower_bound() -> None:
    p, q = {"1": 0.5, "2": 0.3, "3": 0.2}, {"1": 0.2, "2": 0.3, "3": 0.5}
    logs = [{k: math.log(v) for k, v in side.items()} for side in (p, q)]
    exact = sum(p[k] * math.log(p[k] / q[k]) for k in p)
    assert divergence(*logs) == pytest.approx(exact)
    assert 0 < divergence({"1": math.log(0.5)}, {"1": math.log(0.2), "2": -9.0}) < exact
    assert divergence(logs[0], logs[0]) == 0
    assert math.isfinite(divergence({"1": 0.0}, {"2": 0.0}))


def test_models_that_are_held_against_one_share_its_draws_and_figures() -> None:
    rng, n = np.random.default_rng(1), 30
    base, *models = ({name: rng.integers(1, 9, (n, 2)).astype(float) for name in "abc"} for _ in range(3))
    del models[1]["b"]
    together = figures_beside(models, base, 0)
    assert together == [figures_beside([one], base, 0)[0] for one in models]
    for model, found in zip(models, together, strict=True):
        columns = (np.stack([side[name] for name in model]) for side in (model, base))
        assert [figure.difference for figure in found.values()] == paired(*columns)


# -------- the file that grows


def test_a_store_goes_on_where_it_was_cut_short_and_refuses_others(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    store = Store(path, {"a": 1, "b": (2, 3)})
    store["x"], store["y"] = 1, 2
    raw = path.read_bytes()
    for cut in random.Random(0).sample(range(len(raw)), 20):
        path.write_bytes(raw[:cut])
        again = Store(path, {"a": 1, "b": (2, 3)})
        again.once("x", lambda: 1)
        again.once("y", lambda: 2)
        assert path.read_bytes() == raw
    with pytest.raises(UsageError, match="other settings: b"):
        Store(path, {"a": 1, "b": (2, 4)})
    for nonsense in ("{}\n", "[1]\n", "nonsense\n", '{"a": 1, "b": 2}\n', "mine, and in no lines"):
        path.write_text(nonsense)
        with pytest.raises(UsageError, match=r"not a file of records|other settings"):
            Store(path, {"a": 1})
        assert path.read_text() == nonsense


SAID = {"caption": "a cup", "finished": True, "tokens": 2, "next_tokens": {"1": -0.5}, "stops": [[0.5, 1]],
        "answers": {"cup": 0.5}}  # fmt: skip
TRIED = {"chair_s": 0.1, "chair_i": 0.1, "recall": 0.9, "length": 2.0, "words": 9.0, "kl_prompts": 0.1,
         "recall_lost": 0, "seconds": 3.5}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "good", "damage"),
    [
        ("a.png", SAID, {"caption": 3}), ("a.png", SAID, {"tokens": -1}), ("a.png", SAID, {"stops": [[0.5, -1]]}),
        ("a.png", SAID, {"next_tokens": {"1": math.nan}}), ("a.png", SAID, {"next_tokens": {"1": 800}}),
        ("a.png", SAID, {"answers": {"cup": 1.5}}), ("a.png", SAID, {"answers": None}), ("a.png", SAID, {"more": 1}),
        ("a.png", SAID, {"stops": [[-math.inf, 1]]}), ("a.png", SAID, {"tokens": 10**299 * 10}),
        (":text", [[0.5], [{"1": -0.5}]], [[1e5], [{"1": -0.5}]]), (":text", [[0.5], [{}]], [[0.5]]),
        ("trial x", TRIED, {"chair_s": math.nan}), ("trial x", TRIED, {"recall": "high"}), ("look x", "2026", 3),
        ("settings in 3 minutes", 4, 4.5), ("settings in 3 minutes", 4, True),
    ],
)  # fmt: skip
def test_a_damaged_record_is_told_with_its_line(tmp_path: Path, key: str, good: Any, damage: Any) -> None:
    path = tmp_path / "records.jsonl"
    kinds = KINDS_KEPT if key in ("a.png", ":text") else LOGGED
    Store(path, {"a": 1}, kinds)[key] = good
    assert Store(path, {"a": 1}, kinds)[key] == good
    missing = {name: good[name] for name in list(good)[1:]} if isinstance(good, dict) else None
    for wrong in [{**good, **damage}, missing] if isinstance(good, dict) else [damage]:
        path.write_text(f'[":settings", {{"a": 1}}]\n{json.dumps([key, wrong])}\n')
        with pytest.raises(UsageError, match=r"not a file of records, line 2: ") as told:
            Store(path, {"a": 1}, kinds)
        assert (told.value.where, "measured anew" in str(told.value.fix)) == (str(path), True)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b'["a", "\xff"]\n', b'["a", 1, 2]\n', b'["a", ' + b"9" * 5000 + b"]\n",
                                  b"[" * 9000 + b"\n", b"\n", b'["a", "' + b"x" * 5000])  # fmt: skip
def test_a_line_that_is_none_is_told(tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkpatch.evaluation.records.MOST_BYTES", 5000)  # of a line
    (tmp_path / "records.jsonl").write_bytes(line)
    with pytest.raises(UsageError, match="not a file of records, line 1: "):
        Store(tmp_path / "records.jsonl", {})
    assert (tmp_path / "records.jsonl").read_bytes() == line


def test_runs_of_parts_write_to_files_of_their_own_and_the_whole_takes_them_over(tmp_path: Path) -> None:
    path, said = tmp_path / "records.jsonl", {"agreed": {"b": 2}, "machine": {"cpu": "x"}}
    one, two = Store(path, {"a": 1}, **said), Store(path, {"a": 1}, **said)  # of one part, at once
    for store in (one, two):
        store["x"] = 1
    two["y"] = "long" * 10_000
    first, second = of_parts(tmp_path)
    with max(first, second, key=lambda place: place.stat().st_size).open("a") as file:
        file.write('["z", {"half')
    assert {"x", "y"} == Store(path, {"a": 1}, **said).keys() - {":settings"}
    assert not path.exists()
    with pytest.raises(UsageError, match="other settings: cpu"):
        Store(path, {"a": 1}, agreed={"b": 2}, machine={"cpu": "y"})
    with pytest.raises(UsageError, match="other settings: b"):
        Store(path, {"a": 1}, agreed={"b": 3})
    whole = Store(path, {"a": 1}, agreed={"b": 2})
    for key, value in (("x", 1), ("y", "long" * 10_000), ("z", 3)):
        assert whole.once(key, lambda: 3) == value
    single = Store(tmp_path / "single.jsonl", {"a": 1})
    single.update({"x": 1, "y": "long" * 10_000, "z": 3})
    assert path.read_bytes() == (tmp_path / "single.jsonl").read_bytes()
    for place in of_parts(tmp_path):
        place.unlink()
    one["late"] = 4  # which begins anew, with its settings
    (late,) = of_parts(tmp_path)
    assert [json.loads(line)[0] for line in late.read_text().splitlines()] == [":settings", "late"]
