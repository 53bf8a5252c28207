"""Real models on pictures: figures that agree with the evidence's own code, runs that go on, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import last_said
from conftest import REPO, build_tiny
from failing import interrupt
from jsonschema import Draft202012Validator
from safetensors.torch import load_file, save_file
from typer.testing import Result

import qkpatch
from qkpatch.errors import QKPatchError, UsageError
from qkpatch.evaluation.bench import Evaluation
from qkpatch.evaluation.comparison import ended
from qkpatch.evaluation.measure import Task
from qkpatch.evaluation.pope import KINDS
from qkpatch.evaluation.records import Inputs, Protocol
from qkpatch.evaluation.subject import Subject

sys.path.insert(0, str(REPO))

from scripts.toy_vlm.captioning import Seen, captions
from scripts.toy_vlm.model import load_model
from scripts.toy_vlm.scenes import scenes
from scripts.toy_vlm.scoring import chair, score

Run = Callable[..., Result]

TOY = REPO / "demo" / "toy-0"
ASKED = Protocol("<image> describe :", "<image> exists {object}", 1, max_new_tokens=32, keep_unfinished=True)
FLAGS = ("--prompt", ASKED.prompt, "--question", ASKED.question, "--max-new-tokens", 32, "--questions", 1)
SCHEMA = json.loads((resources.files("qkpatch") / "evaluation" / "evaluation.schema.json").read_text())


def inputs(album: Path, **more: Any) -> Inputs:
    return Inputs(album / "pictures", album / "objects.jsonl", text=album / "text.txt", **more)


def given(album: Path, *more: object) -> tuple[object, ...]:
    return last_said("--images", album / "pictures", "--objects", album / "objects.jsonl", *FLAGS, *more)


@pytest.fixture(scope="module")
def toy32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy in float32, as the evidence runs it."""
    folder = tmp_path_factory.mktemp("float32") / "toy-0"
    shutil.copytree(TOY, folder)
    tensors = {name: tensor.float() for name, tensor in load_file(TOY / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


@pytest.fixture(scope="module")
def plain(toy32: Path, album: Path) -> Evaluation:
    """What the model says by itself."""
    return qkpatch.evaluate(toy32, inputs(album), ASKED)


@pytest.fixture(scope="module")
def evidence() -> tuple[Any, Seen]:
    """The model and the pictures, as the evidence's own code takes them."""
    loaded = load_model(TOY)
    return loaded, Seen.by(loaded, list(islice(scenes("broken", 2026, 4), 40)))


# -------- figures


def test_captions_and_chair_are_those_of_the_evidence(plain: Evaluation, evidence: tuple[Any, Seen]) -> None:
    result, seen = plain, evidence[1].scenes
    theirs = captions(*evidence)
    assert [record.caption.split() for record in result.sides[0].records] == [list(words) for words in theirs]
    expected = chair([score(words, scene.names) for words, scene in zip(theirs, seen, strict=True)])
    found = result.to_json()["sides"][0]["figures"]
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-8)
    assert 0 < found["chair_s"] < 1


def test_captions_that_stop_earlier_are_those_of_the_evidence(
    plain: Evaluation, evidence: tuple[Any, Seen]
) -> None:
    """A bias towards the end cuts a greedy caption short, and changes nothing before: no second run is needed."""
    theirs = {bias: captions(*evidence, stop_bias=bias) for bias in (0.5, 1.0, 2.0, 4.0, 1e9)}
    for bias, said in theirs.items():
        assert [ended(record, bias).split() for record in plain.sides[0].records] == [
            list(words) for words in said
        ]
    assert captions(*evidence) != theirs[2.0]


def test_answers_are_the_probabilities_of_yes_beside_no(toy32: Path, album: Path) -> None:
    task = Task.of(inputs(album, batch_size=3), Protocol(**{**vars(ASKED), "sample": 6}))
    subject = Subject.load(str(toy32))
    loaded, words = load_model(TOY), subject.processor.tokenizer.get_vocab()
    for name in task.pictures.present:
        one = Task.of(inputs(album), ASKED).pictures.only([name])
        things = sorted({thing for part in ("present", *KINDS) for thing in task.questions[name][part]})
        batch = subject.processor(images=[[_open(one.folder / name)]], text=["<image> exists " + things[0]],
                                  return_tensors="pt")  # fmt: skip
        with torch.inference_mode():
            p = loaded(**batch).logits[0, -1].softmax(-1)
        expected = float(p[words["yes"]] / (p[words["yes"]] + p[words["no"]]))
        asked = [task.protocol.asked(thing) for thing in things]
        found = subject.yes([one.folder / name] * len(things), asked)
        assert found[0] == pytest.approx(expected, abs=1e-5)


def _open(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_perplexity_is_that_of_transformers(toy32: Path) -> None:
    subject = Subject.load(str(toy32))
    text = "describe : cup . fork . moon . " * 30  # two windows
    losses, reading = subject.read(text)
    ids = subject.processor.tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        first = subject.model(input_ids=ids[:, :128], labels=ids[:, :128]).loss
    assert len(losses) == len(reading) == ids.shape[1] - 1
    assert sum(losses[:127]) / 127 == pytest.approx(float(first), rel=1e-5)
    assert all(
        sum(torch.tensor(list(row.values())).exp()) == pytest.approx(1, abs=1e-4) for row in reading[:5]
    )


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_chat_template_is_used_where_there_is_one(
    start: str, run: Run, album: Path, tmp_path: Path
) -> None:
    toy = _toy(tmp_path)
    parts = "{% if c.type == 'image' %}<image>{% else %} {{ c.text }}{% endif %}"
    template = (
        f"{start}{{% for m in messages %}}{{% for c in m.content %}}{parts}{{% endfor %}}{{% endfor %}}"
    )
    (toy / "chat_template.jinja").write_text(template)
    subject = Subject.load(str(toy))
    assert subject.prompt("describe :") == f"{start}<image> describe :"
    picture = album / "pictures" / "0000.png"
    short = Protocol("describe :", "exists {object}", max_new_tokens=8)
    assert subject.captions([picture], short) == subject.captions(
        [picture], Protocol(ASKED.prompt, max_new_tokens=8)
    )
    assert subject.yes([picture], ["exists cup"]) == subject.yes([picture], ["<image> exists cup"])
    subject.check(short)


@pytest.mark.floor
def test_an_edit_in_memory_is_what_apply_writes(run: Run, album: Path, tmp_path: Path) -> None:
    flags = ("--layers", "2-6", "--modes", 2, "--alpha", 0.2)
    assert run("apply", TOY, "-o", tmp_path / "out", *flags).exit_code == 0
    by_flags = run("evaluate", TOY, *given(album, "--sample", 12, "--json"), *flags)
    by_file = run("evaluate", tmp_path / "out", *given(album, "--sample", 12, "--json"), "--against", TOY)
    assert by_flags.exit_code == by_file.exit_code == 0, by_flags.output + by_file.output
    a, b = (json.loads(result.stdout) for result in (by_flags, by_file))
    for document in (a, b):
        Draft202012Validator(SCHEMA).validate(document)
    assert a["comparisons"] == b["comparisons"]
    assert [side["said"] for side in a["sides"]] == [side["said"] for side in b["sides"]]
    assert a["sides"][1]["edit"] == {"layers": "2-6", "modes": 2, "alpha": 0.2}
    (compared,) = a["comparisons"]
    assert compared["kept"]["kl_prompts"] > 0
    assert len(compared["kl"]) == 12
    assert a["sides"][0]["figures"] != a["sides"][1]["figures"]


@pytest.mark.long
def test_the_statistics_can_be_redone_from_the_result(album: Path) -> None:
    document = qkpatch.evaluate(TOY, inputs(album), ASKED, layers="0-8", modes=1, alpha=0.0).to_json()
    Draft202012Validator(SCHEMA).validate(document)
    for side in document["sides"]:
        made_up = [bool(set(row["mentions"]) - set(row["objects"])) for row in side["said"]]
        assert side["figures"]["chair_s"] == pytest.approx(sum(made_up) / len(made_up))
    base, model = (
        [set(row["mentions"]) <= set(row["objects"]) for row in s["said"]] for s in document["sides"]
    )
    (compared,) = document["comparisons"]
    assert compared["mcnemar"]["chair_s"]["only_base"] == sum(
        y and not x for x, y in zip(base, model, strict=True)
    )
    assert compared["kept"]["perplexity_ratio"] > 1
    assert "fewer objects" in " ".join(document["warnings"])
    # CHAIR_s of nothing at all is no gain: it is that of captions that stop at once.
    equal = compared["figures"]["chair_s_at_equal_recall"]
    assert equal["model"] == compared["figures"]["chair_s"]["model"]
    assert equal["base"] < compared["figures"]["chair_s"]["base"]
    assert equal["difference"]["estimate"] > -0.2


@pytest.mark.long
def test_a_table_says_what_was_found(run: Run, album: Path) -> None:
    result = run("evaluate", TOY, *given(album), "--alpha", 0.5)
    assert result.exit_code == 0, result.output
    for word in (
        "chair_s",
        "recall",
        "adversarial_f1",
        "McNemar",
        "Kept: kl_prompts",
        "chair_s_at_equal_recall",
    ):
        assert word in result.output
    alone = run("evaluate", TOY, *given(album, "--questions", 0))
    assert alone.exit_code == 0, alone.output
    assert "chair_s" in alone.output
    assert "adversarial" not in alone.output


# -------- into a card


@pytest.mark.long
def test_a_card_takes_the_figures_of_its_own_edit_alone(run: Run, album: Path, tmp_path: Path) -> None:
    made, out, m = tmp_path / "made", tmp_path / "out", tmp_path / "m"
    short = given(album, "--sample", 8, "--questions", 0, "--max-new-tokens", 8)
    assert run("apply", TOY, "-o", made, "--layers", "2-6", "--modes", 2, "--alpha", 0.2).exit_code == 0
    plain = Path(shutil.copytree(made, tmp_path / "plain"))
    (plain / "qkpatch.json").unlink()
    cases: list[tuple[tuple[object, ...], str | None]] = [
        ((TOY, "--layers", "0-8", "--modes", 2, "--alpha", 0.5), "alpha, layers differ"),
        ((TOY, "--layers", "2-6", "--modes", 2, "--alpha", 0.2, "--heads", 0), "heads differ"),
        # What is said by default is said.
        ((TOY, "--layers", "2-6", "--modes", 2, "--alpha", 0.2, "--channel", "full"), None),
        ((made, "--against", TOY), None),
        ((plain, "--against", TOY), "nothing records which edit"),
    ]
    for i, (arguments, says) in enumerate(cases):
        assert run("evaluate", *arguments, *short, "-o", m / str(i)).exit_code == 0
        result = run("card", made, "--results", m / str(i) / "evaluation.json")
        is_refused = says is not None and "differ" in says
        assert result.exit_code == (2 if is_refused else 0), result.output
        assert says is None or says in result.output
        assert ("nothing records" in result.output) == (says == "nothing records which edit")
    assert run("apply", TOY, "-o", out, "--layers", "2-6", "--modes", 2, "--alpha", 0.5).exit_code == 0
    for i in (2, 3):
        result = run("card", out, "--results", m / str(i) / "evaluation.json", "--write")
        assert result.exit_code == 2, result.output
        assert "alpha differ" in result.output


def test_a_card_has_the_interval_as_it_was_drawn(run: Run, album: Path, tmp_path: Path) -> None:
    out, m = tmp_path / "out", tmp_path / "m"
    edit = ("--layers", "0-8", "--modes", 1, "--alpha", 0)
    assert run("apply", TOY, "-o", out, *edit).exit_code == 0
    assert run("evaluate", TOY, *given(album, "--sample", 8, "--questions", 0), *edit, "-o", m).exit_code == 0
    (compared,) = json.loads((m / "evaluation.json").read_text())["comparisons"]
    result = run("card", out, "--results", m / "evaluation.json", "--write")
    assert result.exit_code == 0, result.output
    card = (out / "README.md").read_text()
    for name, figure in compared["figures"].items():
        low, high = (figure["difference"][key] for key in ("low", "high"))
        assert f"| pictures | {name} | 8 |" in card
        assert f"| {low:+.4f} to {high:+.4f}, 95 % bootstrap | - |" in card
    assert "standard errors" not in card
    assert "±" not in card
    proof = run("verify", out, "--source", TOY)
    assert proof.exit_code == 0, proof.output
    assert "reports results, which are its author's" in proof.output


# -------- runs that end early


@pytest.mark.long
def test_a_run_goes_on_and_ends_as_if_it_had_never_stopped(
    album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    edit = {"layers": "3-5", "alpha": 0.5}
    qkpatch.evaluate(TOY, inputs(album), ASKED, out=whole, **edit)
    n_kept = 0
    for n_batches in (1, 3, 4):
        with monkeypatch.context() as patched:
            interrupt(patched, Subject, "captions", n_batches)
            with pytest.raises(KeyboardInterrupt):
                qkpatch.evaluate(TOY, inputs(album), ASKED, out=out, **edit)
        assert not (out / "evaluation.json").exists()
        n_kept += n_batches
        assert sum(p.read_text().count(".png") for p in out.glob("*.jsonl")) == 8 * n_kept
    for grown in sorted(out.glob("*.jsonl")):
        grown.write_bytes(grown.read_bytes()[:-7])
    qkpatch.evaluate(TOY, inputs(album), ASKED, out=out, **edit)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    kept = next(p for p in out.glob("*.jsonl") if p.name != "log.jsonl")
    for damage in (r'"answers":\{"\w+":[\d.e-]+,?', r'(?<=":text",\[\[)[\d.e-]+,'):
        raw = kept.read_text()
        kept.write_text(
            re.sub(damage, lambda found: found[0][:11] if "answers" in found[0] else "", raw, count=1)
        )
        with pytest.raises(UsageError, match=r"has no answer about|losses and"):
            qkpatch.evaluate(TOY, inputs(album), ASKED, out=out, **edit)
        kept.write_text(raw)


def test_a_run_of_other_settings_is_refused(run: Run, album: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("evaluate", TOY, *given(album, "-o", out, "--questions", 0)).exit_code == 0
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    again = run("evaluate", TOY, *given(album, "-o", out, "--questions", 0, "--max-new-tokens", 3))
    assert again.exit_code == 2
    assert "other settings: protocol" in again.output
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    # Another batch, which memory may ask for, is no other run; nothing is asked again.
    assert run("evaluate", TOY, *given(album, "-o", out, "--questions", 0, "--batch-size", 3)).exit_code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


def test_a_result_of_something_else_is_not_written_over(album: Path, tmp_path: Path) -> None:
    for folder, call in ((tmp_path, qkpatch.evaluate), (tmp_path / "edit.tune", qkpatch.tune)):
        folder.mkdir(exist_ok=True)
        (folder / "evaluation.json").write_text("mine")
        out = folder.with_suffix(".yaml") if call is qkpatch.tune else folder
        with pytest.raises(UsageError, match=r"no log\.jsonl that it would be of"):
            call(TOY, inputs(album), out=out, protocol=ASKED)
        assert [path.read_text() for path in folder.glob("*.json*")] == ["mine"]


@pytest.mark.parametrize("to", ["", "sub", "link"])
def test_nothing_is_written_into_a_model(to: str, album: Path, tmp_path: Path) -> None:
    toy = _toy(tmp_path)
    (tmp_path / "link").symlink_to(toy)
    before = sorted(toy.rglob("*"))
    out = tmp_path / "link" if to == "link" else toy / to
    for call, place in ((qkpatch.evaluate, out), (qkpatch.tune, out / "edit.yaml")):
        with pytest.raises(UsageError, match="OUT lies in SOURCE"):
            call(toy, inputs(album), out=place, protocol=ASKED)
    assert sorted(toy.rglob("*")) == before


def test_another_run_does_not_write_over_the_result_of_the_first(
    run: Run, album: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    short = given(album, "-o", out, "--sample", 8, "--questions", 0, "--max-new-tokens", 8)
    assert run("evaluate", TOY, *short, "--alpha", 0.5).exit_code == 0
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    for other in (("--alpha", 0.4), (), ("--alpha", 0.5, "--against", REPO / "demo" / "toy-1")):
        result = run("evaluate", TOY, *short, *other)
        assert result.exit_code == 2, result.output
        assert "it holds a run of other settings: models and edits" in " ".join(result.output.split())
        assert {p.name: p.read_bytes() for p in out.iterdir()} == files
    assert run("evaluate", TOY, *short, "--alpha", 0.5).exit_code == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


# -------- what is refused


@pytest.mark.parametrize("broken", ["empty", "cut short", "text", "bomb"])
@pytest.mark.floor
def test_a_picture_that_cannot_be_read_is_named(broken: str, run: Run, album: Path, tmp_path: Path) -> None:
    shutil.copytree(album, tmp_path / "album")
    picture = tmp_path / "album" / "pictures" / "0007.png"
    raw = picture.read_bytes()
    contents = {"empty": b"", "cut short": raw[: len(raw) // 2], "text": b"<html></html>"}
    if broken == "bomb":
        from PIL import Image

        Image.new("1", (20000, 20000)).save(picture)
    else:
        picture.write_bytes(contents[broken])
    result = run("evaluate", TOY, *given(tmp_path / "album", "-o", tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert "not a picture that can be read" in result.output
    assert "0007.png" in result.output
    assert not (tmp_path / "out").exists()


def _toy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TOY, tmp_path / "toy"))


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--prompt", "Describe it."), 3, "no chat template"),
        (("--question", "Is there a {object}?"), 3, "no chat template"),
        (("--question", "<image> exists it"), 2, "asks about no object"),
        (("--sample", 41), 2, "40 pictures, fewer than 41"),
        (("--batch-size", 0), 2, "no number from 1 on"),
        (("--layers", "99"), 2, "99"),
        (("--device", "abacus"), 2, "not a device"),
        (("--against", "demo/toy-9"), 2, "no such file"),
        (("--max-shard-size", "1GB"), 2, "no such option"),
        (("--text", "nowhere.txt"), 4, "nowhere.txt"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    flags: tuple[object, ...], code: int, says: str, run: Run, album: Path, tmp_path: Path
) -> None:
    result = run("evaluate", TOY, *given(album, "-o", tmp_path / "out", *flags))
    assert result.exit_code == code, result.output
    assert says in result.output
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(("flag", "text"), [("--prompt", "describe :"), ("--question", "exists {object}")])
def test_a_prompt_without_the_image_is_told_by_its_flag(flag: str, text: str, run: Run, album: Path) -> None:
    result = run("evaluate", TOY, *given(album, flag, text))
    assert result.exit_code == 3, result.output
    assert "it lacks <image>" in result.output
    assert f"where  {flag}\n" in result.output


@pytest.mark.parametrize("command", ["evaluate", "tune"])
def test_the_help_has_one_word_for_the_model_and_all_of_its_texts(command: str, run: Run) -> None:
    text = " ".join(run(command, "--help").output.replace("│", " ").split())
    assert "SOURCE" in text
    assert "MODEL" not in text
    assert "a list of words by object." in text


def test_yes_and_no_that_are_no_tokens_are_told_with_the_cure(run: Run, album: Path, tmp_path: Path) -> None:
    toy = _toy(tmp_path)
    tokens = json.loads((toy / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["jawohl"] = vocabulary.pop("yes")
    (toy / "tokenizer.json").write_text(json.dumps(tokens))
    result = run("evaluate", toy, *given(album))
    assert result.exit_code == 3, result.output
    assert "'yes' is no single token" in result.output
    assert "--questions 0" in result.output
    assert run("evaluate", toy, *given(album, "--questions", 0, "--sample", 4)).exit_code == 0


def test_models_that_cannot_be_asked_about_pictures(run: Run, album: Path, tmp_path: Path) -> None:
    text_model = build_tiny(tmp_path / "text").path
    result = run("evaluate", text_model, *given(album))
    assert result.exit_code == 3, result.output
    assert "Traceback" not in result.output
    toy = _toy(tmp_path)
    (toy / "processor_config.json").unlink()
    result = run("evaluate", toy, *given(album))
    assert result.exit_code == 3, result.output
    assert "processor" in result.output


def test_code_of_its_own_is_run_only_where_that_is_said(run: Run, album: Path, tmp_path: Path) -> None:
    toy = _toy(tmp_path)
    config = json.loads((toy / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"},
    }
    (toy / "config.json").write_text(json.dumps(config))
    (toy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    result = run("evaluate", toy, *given(album))
    assert result.exit_code == 3, result.output
    assert "--trust-remote-code" in result.output
    assert not (tmp_path / "ran").exists()
    run("evaluate", toy, *given(album, "--trust-remote-code"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(("missing", "cure"), [("transformers", "qkpatch[eval]"), ("PIL", "qkpatch[eval]")])
def test_a_missing_extra_names_its_install_line(
    missing: str, cure: str, run: Run, album: Path, monkeypatch: Any
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    result = run("evaluate", TOY, *given(album))
    assert result.exit_code == 2, result.output
    assert f"pip install '{cure}'" in result.output


def test_memory_that_runs_out_is_told_with_a_smaller_batch(
    run: Run, album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def starve(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("transformers.generation.utils.GenerationMixin.generate", starve)
    result = run("evaluate", TOY, *given(album, "-o", tmp_path / "out", "--sample", 8))
    assert result.exit_code == 4, result.output
    assert "--batch-size 4" in result.output
    monkeypatch.undo()
    assert (
        run(
            "evaluate", TOY, *given(album, "-o", tmp_path / "out", "--batch-size", 4, "--sample", 8)
        ).exit_code
        == 0
    )


@pytest.mark.parametrize("of", ["all", "a word of the text"])
def test_a_model_that_computes_nan_is_told_so(of: str, run: Run, album: Path, tmp_path: Path) -> None:
    toy, text = _toy(tmp_path), tmp_path / "text.txt"
    text.write_text("count count count")  # which no picture is told by
    tensors = load_file(toy / "model.safetensors")
    if of == "all":
        tensors["language_model.model.norm.weight"].fill_(float("nan"))
    else:
        tensors["language_model.model.embed_tokens.weight"][9].fill_(float("nan"))
    save_file(tensors, toy / "model.safetensors", {"format": "pt"})
    result = run("evaluate", toy, *given(album, "--sample", 4, "--text", text))
    assert result.exit_code == 3, result.output
    assert "computes NaN" in result.output


def test_a_model_of_which_transformers_would_draw_a_part_is_refused(
    run: Run, album: Path, tmp_path: Path
) -> None:
    toy = _toy(tmp_path)
    tensors = load_file(toy / "model.safetensors")
    norm = tensors.pop("language_model.model.norm.weight")
    save_file(
        {**tensors, "language_model.model.other_norm.weight": norm},
        toy / "model.safetensors",
        {"format": "pt"},
    )
    result = run("evaluate", toy, *given(album, "--sample", 4))
    assert result.exit_code == 3, result.output
    assert "transformers found no" in result.output
    assert "norm.weight" in result.output


def test_an_adapter_is_evaluated_with_its_model_and_not_edited(run: Run, album: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(TOY, dtype="auto")
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(TOY)
    adapted.save_pretrained(tmp_path / "adapter")
    result = run("evaluate", tmp_path / "adapter", *given(album, "--json", "--sample", 8, "--against", TOY))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["comparisons"][0]["kept"]["kl_prompts"] > 0
    edited = run("evaluate", tmp_path / "adapter", *given(album, "--alpha", 0.5))
    assert edited.exit_code in (2, 3), edited.output


@pytest.mark.long
def test_the_base_of_an_adapter_is_the_one_that_it_was_made_from(
    run: Run, album: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    source, other, adapter = _toy(tmp_path), REPO / "demo" / "toy-1", tmp_path / "adapter"
    assert run("lora", source, "--alpha", 0.2, "-o", adapter).exit_code == 0
    (tmp_path / "elsewhere" / "toy").parent.mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(other, "toy")  # of the name that the adapter has its base by
    short = given(album, "--sample", 8, "--questions", 0, "--max-new-tokens", 8)
    for calls in ((adapter,), (adapter, "--against", other), (other, "--against", adapter)):
        result = run("evaluate", *calls, *short, "-o", "m")
        assert result.exit_code == 2, result.output
        assert "the adapter's base, toy, is not there; not it: " in result.output
        assert "--against SOURCE" in result.output
        assert not Path("m").exists()
    with_edit = run("evaluate", source, *short, "--json", "--alpha", 0.2)
    for calls in ((adapter, "--against", source), (adapter, "--against", other, "--against", source)):
        result = run("evaluate", *calls, *short, "--json")
        assert result.exit_code == 0, result.output
        ours, theirs = (json.loads(each.stdout)["comparisons"][-1]["kept"] for each in (result, with_edit))
        assert ours["kl_prompts"] == pytest.approx(theirs["kl_prompts"], rel=0.2)
    assert run("evaluate", source, "--against", adapter, *short).exit_code == 0
    monkeypatch.chdir(tmp_path)  # where the base is, by its name
    assert run("evaluate", adapter, *short).exit_code == 0
    # What another program wrote has no digests, and goes by the name.
    (adapter / "qkpatch.json").unlink()
    monkeypatch.chdir(album)
    assert run("evaluate", adapter, *short).exit_code == 2
    assert run("evaluate", adapter, "--against", source, *short).exit_code == 0


def test_from_python_what_is_wrong_is_an_error_object(album: Path) -> None:
    with pytest.raises(QKPatchError):
        qkpatch.evaluate(TOY, inputs(album), ASKED, alpha=2)
    with pytest.raises(QKPatchError):
        qkpatch.evaluate(TOY, Inputs(album / "nowhere", album / "objects.jsonl"), ASKED)
