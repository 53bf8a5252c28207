"""The library under the command line: values in, frozen values out, errors as objects, nothing global."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Tiny, build_tiny
from edited_families import CASES
from fake_hub import Repo, fake_hub, hub_environment
from safetensors.torch import load_file
from typer.testing import Result

import qkpatch
from qkpatch.errors import FileSystemError, QKPatchError, UnsupportedError, UsageError

Run = Callable[..., Result]


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def without_run(out: Path) -> dict[str, Any]:
    record = json.loads((out / "qkpatch.json").read_text())
    record.pop("run")
    return dict(record)


# -------- what each call does


def test_importing_reads_no_torch_and_nothing_else_until_a_call_is_used() -> None:
    code = (
        "import sys, qkpatch; assert not {'torch', 'qkpatch.api', 'typer', 'rich'} & set(sys.modules); "
        "plan = qkpatch.plan; assert 'torch' not in sys.modules; assert 'apply' in dir(qkpatch)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_call_does_what_its_command_does(tiny: Tiny, tmp_path: Path, run: Run) -> None:
    plan = qkpatch.plan(tiny.path, layers=range(1, 3), modes=2, alpha=0.5, channel="symmetric", heads=[0, 3])
    manifest = qkpatch.apply(plan, tmp_path / "called")
    flags = ("--layers", "1-2", "--modes", 2, "--alpha", 0.5, "--channel", "symmetric", "--heads", "0,3")
    assert run("apply", tiny.path, "-o", tmp_path / "run", *flags).exit_code == 0
    called, ran = contents(tmp_path / "called"), contents(tmp_path / "run")
    assert called.pop("qkpatch.json").decode() == manifest.dumps()
    ran.pop("qkpatch.json")
    assert called == ran
    assert without_run(tmp_path / "called") == without_run(tmp_path / "run")

    assert qkpatch.verify(tmp_path / "called", tiny.path).ok
    assert not qkpatch.diff(tiny.path, tmp_path / "called").equal
    assert qkpatch.diff(tmp_path / "run", tmp_path / "called").layout is not None
    assert qkpatch.recipe_for(tiny.path).name == "llama"
    assert qkpatch.card(tmp_path / "called") == run("card", tmp_path / "called").stdout
    spectra = qkpatch.spectra(tiny.path, layers=[1], modes=2)
    shown = json.loads(run("inspect", tiny.path, "--layers", "1", "--modes", "2", "--json").stdout)
    assert [[list(h.singular_values) for h in layer.heads] for layer in spectra] == [
        [head["singular_values"] for head in layer["heads"]] for layer in shown["layers"]
    ]


def test_an_earlier_output_is_replaced_where_that_is_said(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    qkpatch.apply(qkpatch.plan(tiny.path), out)
    plan = qkpatch.plan(tiny.path, alpha=0.0)
    with pytest.raises(UsageError, match="not empty"):
        qkpatch.apply(plan, out)
    qkpatch.apply(plan, out, overwrite=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="as qkpatch left it"):
        qkpatch.apply(plan, out, overwrite=True)
    qkpatch.apply(plan, out, overwrite=True, force=True)
    assert qkpatch.verify(out, tiny.path).ok


@pytest.mark.long
@pytest.mark.parametrize("cache", [True, False])
def test_a_repository_is_planned_and_applied(cache: bool, tiny: Tiny, tmp_path: Path) -> None:
    code = (
        "import sys, qkpatch; plan = qkpatch.plan('org/tiny', layers=1); "
        "manifest = qkpatch.apply(plan, sys.argv[1], cache=sys.argv[2] == 'True'); "
        "assert manifest.source.name == 'org/tiny' and manifest.source.checked, manifest.source; "
        "assert qkpatch.verify(sys.argv[1], 'org/tiny').ok"
    )
    with fake_hub() as hub:
        hub.repos["org/tiny"] = Repo(tiny.path)
        environment = hub_environment(hub.endpoint, tmp_path / "home")
        arguments = [sys.executable, "-c", code, str(tmp_path / "out"), str(cache)]
        subprocess.run(arguments, check=True, env=environment, timeout=120)
    assert bool(list((tmp_path / "home").rglob("*.safetensors"))) == cache


# -------- what is wrong


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        ({"layers": "1-"}, "--layers"),
        ({"layers": []}, "--layers"),
        ({"layers": [1.5]}, "--layers"),
        ({"layers": [1, 1]}, "--layers"),
        ({"layers": -1}, "--layers"),
        ({"layers": 99}, "--layers"),
        ({"layers": [True]}, "--layers"),
        ({"heads": "x"}, "--heads"),
        ({"modes": 0}, "--modes"),
        ({"modes": "4"}, "--modes"),
        ({"modes": True}, "--modes"),
        ({"alpha": 2}, "--alpha"),
        ({"alpha": "half"}, "--alpha"),
        ({"alpha": float("nan")}, "--alpha"),
        ({"channel": "third"}, "--channel"),
        ({"select": 3}, "--select"),
        ({"seed": -1}, "--seed"),
        ({"max_shard_size": "5 bananas"}, "--max-shard-size"),
        ({"max_shard_size": 0}, "--max-shard-size"),
        ({"attention": [3]}, "--attention"),
        ({"recipe": 3}, "--recipe"),
        ({"fold_norm": "yes"}, "--fold-norm"),
    ],
)
def test_a_wrong_value_is_an_error_object(edit: dict[str, Any], where: str, tiny: Tiny) -> None:
    with pytest.raises(QKPatchError) as caught:
        qkpatch.plan(tiny.path, **edit)
    assert caught.value.what
    assert (caught.value.where or "").startswith(where)


@pytest.mark.parametrize(
    ("call", "arguments", "where"),
    [
        ("plan", {"source": 3}, "plan(source=...)"),
        ("plan", {"source": {"password": "hunter2"}}, "plan(source=...)"),
        ("plan", {"patch": 3}, "plan(...)"),
        ("verify", {"out": "x", "sauce": "y"}, "verify(...)"),
        ("plan", {"source": "org/name", "patch": 3}, "plan(patch=...)"),
        ("plan", {"source": "org/name", "writing": "files"}, "plan(writing=...)"),
        ("apply", {"plan": "org/name"}, "apply(plan=...)"),
        ("make_patch", {"plan": "org/name"}, "make_patch(plan=...)"),
        ("apply_in_place", {"plan": None}, "apply_in_place(plan=...)"),
        ("verify", {"out": None, "source": "x"}, "verify(out=...)"),
        ("revert", {"source": 3}, "revert(source=...)"),
        ("card", {"out": "x", "results": 3}, "card(results=...)"),
        ("sweep", {"source": "x", "grid": 3, "out": "y"}, "sweep(grid=...)"),
        ("lora", {"source": "x", "out": None}, "lora(out=...)"),
        ("evaluate", {"model": "x", "inputs": "y"}, "evaluate(inputs=...)"),
    ],
)
def test_an_argument_of_another_type_is_an_error_object(
    call: str, arguments: dict[str, Any], where: str
) -> None:
    with pytest.raises(UsageError) as caught:
        getattr(qkpatch, call)(**arguments)
    assert caught.value.where == where
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match="missing a required argument"):
        getattr(qkpatch, call)()


def test_nothing_is_written_where_something_is_wrong(tiny: Tiny, tmp_path: Path) -> None:
    plan, out = qkpatch.plan(tiny.path), tmp_path / "out"
    for wrong in ({"device": "abacus"}, {"threads": 0}, {"force": True}):
        with pytest.raises(QKPatchError):
            qkpatch.apply(plan, out, **wrong)
    with pytest.raises(QKPatchError):
        qkpatch.apply(plan, tiny.path / "config.json" / "out")
    with pytest.raises(QKPatchError):
        qkpatch.plan(tiny.path, out=tiny.path / "inside")
    with pytest.raises(UsageError, match="beside a request"):
        qkpatch.plan(tiny.path, plan.request, modes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_the_host_process_is_left_as_it_is(
    tiny: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    threads = torch.get_num_threads()
    manifest = qkpatch.apply(qkpatch.plan(tiny.path, modes=2), tmp_path / "out", threads=2)
    assert manifest.edits
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert torch.get_num_threads() == threads
    assert capfd.readouterr() == ("", "")


def test_calls_from_several_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    sources = [build_tiny(tmp_path / f"source-{i}").path for i in range(4)]
    alphas = (0.0, 0.25, 0.5, 0.75)

    def one(i: int) -> dict[str, bytes]:
        plan = qkpatch.plan(sources[i], alpha=alphas[i])
        out = tmp_path / f"out-{i}"
        qkpatch.apply(plan, out, threads=2)
        assert qkpatch.verify(out, sources[i]).ok
        return contents(out)

    def bare(files: dict[str, bytes]) -> dict[str, bytes]:
        return {name: data for name, data in files.items() if name != "qkpatch.json"}

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(4)))
    for i, files in enumerate(together):
        qkpatch.apply(qkpatch.plan(sources[i], alpha=alphas[i]), tmp_path / f"alone-{i}")
        assert bare(files) == bare(contents(tmp_path / f"alone-{i}"))


# -------- loaded models

# Separate, fused and gated rows, query-key norms with and without (1 + w), tied weights, layers that are skipped.
LOADED = (
    "llama",
    "phi3",
    "qwen3",
    "gemma3",
    "qwen3.5",
    "gemma2-text",
    "llava-1.5",
    "qwen2.5-vl",
    "olmo2",
    "internvl",
)


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    case = CASES[name]
    torch.manual_seed(0)
    model = getattr(transformers, case.model_class)(case.config())
    for key, parameter in model.named_parameters():
        if "norm" in key:
            parameter.data.uniform_(0.5, 1.5)
    return model.to(dtype)


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone().view(-1).view(torch.uint8) for name, t in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_model_gets_the_numbers_that_its_files_would(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], build(name)
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    edit = {"layers": range(case.edited[0], case.edited[-1] + 1), "modes": 2, "alpha": 0.25}
    manifest = qkpatch.apply(qkpatch.plan(tmp_path / "source", **edit), tmp_path / "out")
    before = bits(model)
    with qkpatch.patched(model, **edit) as made:
        assert set(made.heads) == {record.tensor for record in manifest.edits}
        assert [made.heads[record.tensor] for record in manifest.edits] == [r.heads for r in manifest.edits]
        model.save_pretrained(tmp_path / "loaded", save_original_format=False)
        assert not equal(bits(model), before)
    assert equal(bits(model), before)
    files, loaded = (
        {n: t for f in sorted((tmp_path / side).glob("*.safetensors")) for n, t in load_file(f).items()}
        for side in ("out", "loaded")
    )
    assert files.keys() == loaded.keys()
    for tensor in files:
        a, b = (side[tensor].reshape(-1).view(torch.uint8) for side in (files, loaded))
        assert torch.equal(a, b), tensor


@pytest.mark.parametrize(
    "edit", [{"select": "random", "seed": 3}, {"channel": "antisymmetric"}, {"select": "shrink"}]
)
def test_controls_and_channels_are_the_same_in_memory(edit: dict[str, Any], tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "source")
    qkpatch.apply(qkpatch.plan(tmp_path / "source", layers=1, modes=2, **edit), tmp_path / "out")
    qkpatch.patch_model(model, layers=1, modes=2, **edit)
    files = load_file(tmp_path / "out" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in files.items())


@pytest.mark.long
@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_model_is_edited_as_the_model_that_it_is(inner: bool) -> None:
    model, plain = build("llama"), build("llama")
    ids = torch.arange(6)[None]
    compiled: Any = torch.compile(model, backend="eager")
    if inner:
        model.model = torch.compile(model.model, backend="eager")
        compiled = model
    before = compiled(ids).logits
    qkpatch.patch_model(plain, layers=1, modes=2)
    with qkpatch.patched(compiled, layers=1, modes=2):
        assert equal({name.replace("_orig_mod.", ""): t for name, t in bits(model).items()}, bits(plain))
        assert torch.equal(compiled(ids).logits, plain(ids).logits)
    assert torch.equal(compiled(ids).logits, before)


def test_the_former_bits_come_back_after_an_error_and_of_any_layout() -> None:
    model = build("llama", torch.float32)
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight.data = layer.weight.data.t().contiguous().t()  # not contiguous
    before = bits_of(layer)

    def evaluate() -> None:
        with qkpatch.patched(model, layers=[1], modes=2):
            assert not torch.equal(bits_of(layer), before)
            raise RuntimeError("evaluation")

    with pytest.raises(RuntimeError, match="evaluation"):
        evaluate()
    assert torch.equal(bits_of(layer), before)


def bits_of(layer: Any) -> torch.Tensor:
    return layer.weight.detach().contiguous().clone()


def test_what_fails_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    model.model.layers[2].self_attn.q_proj.weight.data[-1, -1] = float("nan")
    before = bits(model)
    with pytest.raises(QKPatchError, match="NaN"):
        qkpatch.patch_model(model, layers=range(3), modes=2)
    assert equal(bits(model), before)


def test_models_that_cannot_be_edited_in_place_are_refused_with_a_reason() -> None:
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(CASES["llama"].config())
    with pytest.raises(UnsupportedError, match="meta device"):
        qkpatch.patch_model(empty, layers=[1])
    half = build("llama")
    half.model.layers[0].to("meta")
    with pytest.raises(UnsupportedError, match="meta device"):
        qkpatch.patch_model(half, layers=[1])
    quantised = build("llama")
    quantised.hf_quantizer = object()
    with pytest.raises(UnsupportedError, match="quantised"):
        qkpatch.patch_model(quantised, layers=[1])
    with pytest.raises(QKPatchError, match="no config"):
        qkpatch.patch_model(torch.nn.Linear(2, 2), layers=[1])
    with pytest.raises(UsageError, match="no files"):
        qkpatch.patch_model(build("llama"), layers=[1], max_shard_size="1GB")
    with pytest.raises(UsageError, match="no files"):
        qkpatch.patch_model(build("llama"), layers=[1], exclude="*.bin")
    with pytest.raises(UsageError, match="out of range"):
        qkpatch.patch_model(build("llama"), layers=[99])


def test_weights_that_share_memory_are_refused() -> None:
    tied = build("llama")
    tied.model.layers[1].self_attn.q_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    expanded = build("llama")
    query = expanded.model.layers[1].self_attn.q_proj
    query.weight = torch.nn.Parameter(query.weight[:1].expand_as(query.weight))
    for model in (tied, expanded):
        before = bits(model)
        with pytest.raises(UnsupportedError, match="shares memory"):
            qkpatch.patch_model(model, layers=[0, 1], modes=2)
        assert equal(bits(model), before)


# -------- a source that changes between two calls


def quietly(path: Path, change: Callable[[], object]) -> None:
    """A change after which the file has the times that it had."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("link", [False, True])
def test_a_source_that_changed_after_the_plan_is_refused(link: bool, tiny: Tiny, tmp_path: Path) -> None:
    (tiny.path / "empty.py").write_text("")
    config = tiny.path / "config.json"
    text = config.read_text()
    for path, change in (
        (config, lambda: config.write_text(text.replace('"model_type"', '"model_typo"'))),
        (tiny.path / "empty.py", lambda: (tiny.path / "empty.py").write_text("print()")),
        (tiny.path / "tokenizer.json", lambda: swap_for_pipe(tiny.path / "tokenizer.json")),
    ):
        plan = qkpatch.plan(tiny.path)
        quietly(path, change)
        with pytest.raises(QKPatchError, match=r"changed|not a regular file"):
            qkpatch.apply(plan, tmp_path / "out", link=link)
        assert not (tmp_path / "out").exists()
        config.write_text(text)


def swap_for_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_how_out_is_written_is_a_value_too(tiny: Tiny, tmp_path: Path) -> None:
    plan = qkpatch.plan(tiny.path)
    qkpatch.apply(plan, tmp_path / "out", digest="files")
    assert (tmp_path / "out" / "SHA256SUMS").is_file()
    for wrong in (
        {"digest": "all"},
        {"overwrite": "no"},
        {"threads": True},
        {"threads": "2"},
        {"device": None},
    ):
        with pytest.raises(UsageError):
            qkpatch.apply(plan, tmp_path / "other", **wrong)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["modeling_x.py", "sub/more.txt"])
def test_what_came_into_source_after_the_plan_is_not_left_behind_unsaid(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    plan = qkpatch.plan(tiny.path)
    (tiny.path / name).parent.mkdir(exist_ok=True)
    (tiny.path / name).write_text("x")
    with pytest.raises(FileSystemError, match="came into being"):
        qkpatch.apply(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    qkpatch.apply(qkpatch.plan(tiny.path), tmp_path / "out")
    assert (tmp_path / "out" / name).exists()
