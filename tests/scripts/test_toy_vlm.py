"""The toy: scenes that repeat, scores worked out by hand, training that runs, checkpoints that plain libraries load."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file

sys.path.insert(0, str(REPO))

from scripts.toy_vlm import captioning, compare, model, training
from scripts.toy_vlm.batches import caption_prompt, pixels
from scripts.toy_vlm.glyphs import OBJECTS, THEMES, bitmaps
from scripts.toy_vlm.scenes import ABILITIES, ASKED_OF_EACH, COLOUR_NAMES, FAINT, Scene, scenes
from scripts.toy_vlm.scoring import chair, score
from scripts.toy_vlm.vocabulary import ID, IMAGE, WORDS, make_tokenizer

TOYS = sorted(path.parent for path in (REPO / "demo").glob("toy-*/model.safetensors"))
SHIPPED = REPO / "demo" / "toy-0"


def take(kind, seed: int, stream: int, n: int) -> list[Scene]:
    return list(itertools.islice(scenes(kind, seed, stream), n))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly trained at all: four steps."""
    out = tmp_path_factory.mktemp("toy") / "toy"
    training.train(5, out, SHORT, every=2, tell=lambda line: None)
    return out


SHORT = training.Schedule(tower_steps=2, tower_batch=4, steps=4, batch=4, warm_up=2)


def test_scenes_repeat_and_differ_by_seed_stream_and_kind() -> None:
    once, again = take("natural", 1, 2, 5), take("natural", 1, 2, 5)
    for a, b in zip(once, again, strict=True):
        assert a.objects == b.objects
        assert a.caption == b.caption
        assert a.questions == b.questions
        assert np.array_equal(a.picture, b.picture)
    for kind, seed, stream in (("natural", 2, 2), ("natural", 1, 3), ("broken", 1, 2)):
        assert take(kind, seed, stream, 1)[0].objects != once[0].objects


def test_scenes_are_the_same_on_every_machine() -> None:
    """Numbers of this stack: a change of the generator would make the shipped weights' log untrue."""
    text = repr([(s.objects, s.caption, s.questions) for s in take("broken", 2026, 1, 20)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ee6e130273ccdea8"


def test_themes_come_together_in_training_and_are_torn_apart_in_testing() -> None:
    def members(scene: Scene) -> list[int]:
        return sorted(len(scene.names & set(theme)) for theme in THEMES)[-2:]

    natural, broken = take("natural", 0, 5, 2000), take("broken", 0, 5, 500)
    together = np.mean([members(scene)[-1] for scene in natural])
    assert 3.3 < together < 3.5  # four members with probability 0.85
    assert all(len(scene.objects) == 5 and members(scene) in ([1, 2], [2, 2]) for scene in broken)
    faint = np.mean([placed.contrast < 0.5 for scene in broken for placed in scene.objects])
    assert abs(faint - FAINT) < 0.03
    assert max(len(scene.objects) for scene in natural) <= 7


def test_captions_and_answers_are_true() -> None:
    for scene in take("natural", 3, 0, 200):
        assert set(scene.caption[::2]) == scene.names
        assert set(scene.caption[1::2]) == {"."}
        for ability in ABILITIES:
            assert sum(q.ability == ability for q in scene.questions) == ASKED_OF_EACH
        colour_of = {placed.name: COLOUR_NAMES[placed.colour] for placed in scene.objects}
        for question in scene.questions:
            about = question.words[1]
            truth = {
                "colour": colour_of.get(about),
                "count": str(list(colour_of.values()).count(about)),
                "existence": "yes" if about in colour_of else "no",
            }[question.ability]
            assert question.answer == truth
            assert {*question.words, question.answer} <= set(WORDS)


def test_every_object_has_a_picture_of_its_own_and_shows_where_it_is_placed() -> None:
    flat = bitmaps().reshape(len(OBJECTS), -1)
    distances = np.abs(flat[:, None] - flat[None]).sum(-1) + 100 * np.eye(len(OBJECTS))
    assert distances.min() >= 8  # pixels
    scene = take("natural", 0, 0, 1)[0]
    bright = [placed for placed in scene.objects if placed.contrast > 0.5]
    for placed in bright:
        row, column = divmod(placed.cell, 5)
        cell = scene.picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].astype(float).max(-1)
        ink = bitmaps()[placed.what] > 0
        assert cell[ink].mean() > cell[~ink].mean() + 40


@pytest.mark.parametrize(
    ("caption", "present", "expected"),
    [
        ("cup . fork . ", {"cup", "fork", "pan"}, (2, 0, 2, 3)),
        ("cup . moon . ", {"cup", "fork"}, (2, 1, 1, 2)),
        ("cup . cup . moon . moon .", {"cup"}, (4, 2, 1, 1)),  # every mention counts, an object is found once
        ("", {"cup"}, (0, 0, 0, 1)),
        ("red . yes . describe", {"cup", "pan"}, (0, 0, 0, 2)),  # no nouns of objects
    ],
)
def test_one_caption_scored_by_hand(caption: str, present: set[str], expected: tuple[int, ...]) -> None:
    assert score(caption.split(), present) == expected


def test_chair_by_hand() -> None:
    scored = [
        score(["cup", ".", "moon", "."], {"cup", "fork"}),
        score(["car", ".", "sign", ".", "house", "."], {"car", "sign", "house"}),
        score(["star", ".", "star", "."], {"boat"}),
        score([], {"boat", "fish"}),
    ]
    assert chair(scored) == {"chair_s": 2 / 4, "chair_i": 3 / 7, "recall": 4 / 8, "length": 7 / 4}
    assert chair(scored[3:])["chair_i"] == 0


def test_a_trained_directory_loads_with_plain_transformers(trained: Path) -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(trained)
    loaded = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float32)
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
    assert loaded.config.text_config.num_key_value_heads < loaded.config.text_config.num_attention_heads
    assert loaded.config.text_config.num_hidden_layers >= 8
    assert loaded.config.text_config.head_dim >= 32
    scene = take("broken", 1, 1, 1)[0]
    inputs = processor(images=Image.fromarray(scene.picture), text=f"{IMAGE} describe :", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], caption_prompt(1))
    assert torch.allclose(inputs["pixel_values"], pixels([scene]), atol=1e-6)
    theirs = loaded.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ours = captioning.captions(loaded.eval(), captioning.Seen.by(loaded, [scene]))[0][:8]
    said = processor.decode(theirs, skip_special_tokens=True).split()
    assert said == [word for word in ours if word not in ("<pad>", "<s>", "<unk>", "<image>")]


def test_the_tokenizer_knows_every_word() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer(" ".join(WORDS)).input_ids == [ID["<s>"], *range(len(WORDS))]


def test_batched_captions_are_those_of_single_scenes(trained: Path) -> None:
    loaded = model.load_model(trained)
    some = take("broken", 4, 0, 6)
    together = captioning.captions(loaded, captioning.Seen.by(loaded, some))
    assert together == [captioning.captions(loaded, captioning.Seen.by(loaded, [s]))[0] for s in some]
    losses = captioning.caption_losses(loaded, captioning.Seen.by(loaded, some))
    alone = [captioning.caption_losses(loaded, captioning.Seen.by(loaded, [s]))[0] for s in some]
    assert np.allclose(losses, alone, rtol=1e-5)
    assert [tokens for _, tokens in losses] == [len(s.caption) + 1 for s in some]


def test_an_infinite_bias_stops_at_once(trained: Path) -> None:
    loaded = model.load_model(trained)
    seen = captioning.Seen.by(loaded, take("broken", 4, 0, 3))
    assert captioning.captions(loaded, seen, stop_bias=1e9) == [(), (), ()]


def test_training_repeats_bit_for_bit_also_where_it_was_stopped(trained: Path, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill_once(line: str) -> None:
        if "step 4" in line and not stopped:
            stopped.append(line)
            raise KilledError

    stopped: list[str] = []
    out = tmp_path / "again"
    with pytest.raises(KilledError):
        training.train(5, out, SHORT, every=2, tell=kill_once)
    assert not (out / "model.safetensors").exists()
    training.train(5, out, SHORT, every=2, tell=lambda line: None)
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (out / "training.jsonl").read_text() == (trained / "training.jsonl").read_text()
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("layout", ["hub", "in-memory"])
def test_both_layouts_on_disk_are_accepted_and_edited_alike(
    run, trained: Path, tmp_path: Path, layout
) -> None:
    from transformers import LlavaForConditionalGeneration

    source, out = tmp_path / "source", tmp_path / "out"
    model.write_layout(trained, source, layout)
    assert run("apply", source, "-o", out).exit_code == 0
    assert run("verify", out, "--source", source).exit_code == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    prefix = model.LANGUAGE_TOWER[layout]
    assert changed == {f"{prefix}layers.{n}.self_attn.q_proj.weight" for n in (3, 4, 5)}
    loaded, report = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    for n in (3, 4, 5):
        stored = after[f"{prefix}layers.{n}.self_attn.q_proj.weight"]
        assert torch.equal(
            loaded.model.language_model.layers[n].self_attn.q_proj.weight.to(stored.dtype), stored
        )


def test_comparing_draws_a_picture_and_marks_what_is_not_there(trained: Path, tmp_path: Path, capsys) -> None:
    from PIL import Image

    compare.compare(trained, trained, tmp_path / "sheet.png", 4)
    printed = capsys.readouterr().out
    assert printed.count("before:") == printed.count("after:") == 3
    assert "toy" in printed
    assert Image.open(tmp_path / "sheet.png").size[0] > 800
    scene = take("broken", 0, 0, 1)[0]
    there, absent = sorted(scene.names)[0], next(name for name in OBJECTS if name not in scene.names)
    assert compare.describe((there, ".", absent, "."), scene) == f"{there}, [{absent}: not there]"


def test_scenes_whose_captions_differ_are_shown_first() -> None:
    some = take("broken", 0, 0, 5)
    before, after = [("cup",)] * 5, [("cup",), ("pan",), ("cup",), ("cup",), ("pan",)]
    assert compare.pick(some, before, after) == [0, 1, 4]


@pytest.mark.parametrize("path", TOYS, ids=lambda path: path.name)
def test_shipped_weights_are_those_of_the_sums_and_of_the_log(path: Path) -> None:
    sums = dict(line.split("  ")[::-1] for line in (REPO / "demo" / "SHA256SUMS").read_text().splitlines())
    assert training.sha256(path / "model.safetensors") == sums[f"{path.name}/model.safetensors"]
    identity, *log = map(json.loads, (path / "training.jsonl").read_text().splitlines())
    assert identity == {"seed": int(path.name.rpartition("-")[2]), **vars(training.Schedule())}
    assert log[-1]["step"] == training.Schedule().steps
    assert (path / "model.safetensors").stat().st_size < 4e6


@pytest.mark.skipif(not SHIPPED.is_dir(), reason="a source distribution comes without the trained toys")
def test_the_shipped_toy_looks_at_the_picture_and_hallucinates() -> None:
    loaded = model.load_model(SHIPPED)
    seen = captioning.Seen.by(loaded, take("broken", 9, 9, 100))

    def figure(at: captioning.Seen, name: str) -> float:
        said = captioning.captions(loaded, at)
        return chair([score(w, s.names) for w, s in zip(said, at.scenes, strict=True)])[name]

    elsewhere = captioning.Seen((*seen.scenes[1:], seen.scenes[0]), seen.features)
    assert figure(seen, "recall") > 0.7
    assert 0.05 < figure(seen, "chair_s") < 0.7
    assert figure(elsewhere, "chair_s") > 0.95
