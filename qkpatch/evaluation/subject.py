"""A vision-language model as transformers loads it: what it says, how sure it is of yes, how it reads a text."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkpatch.checkpoint.recognised import ADAPTER
from qkpatch.checkpoint.source import MANIFEST_NAME, open_stored
from qkpatch.checkpoint.tree import source_file, walk_files
from qkpatch.common.json_text import load_json
from qkpatch.common.number_ranges import some
from qkpatch.errors import CheckpointError, FileSystemError, QKPatchError, UnsupportedError, UsageError
from qkpatch.evaluation.records import Protocol, digest
from qkpatch.evaluation.vocabulary import whole_sentences
from qkpatch.model.locate import locate
from qkpatch.patching.device import choose_device
from qkpatch.patching.edit_heads import Editor
from qkpatch.patching.in_memory import edit_loaded
from qkpatch.planning.manifest import Manifest
from qkpatch.planning.request import Request

LIKELIEST = 64  # next tokens that are kept of a distribution
WINDOW, MOST_TOKENS = 512, 2048  # of a text
_EXTRA = "pip install 'qkpatch[eval]'"
_STARVED = ("out of memory", "allocate memory")


@dataclass(frozen=True)
class Subject:
    """A model, ready to be asked, in the numbers that it is stored in."""

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str, device: str = "cpu", base: str = "", *, trusts: bool = False) -> Subject:
        """A checkpoint, or an adapter of peft on ``base``.

        Raises:
            UsageError: a library is not installed, or there is no such device.
            UnsupportedError: code of its own, no image processor, or a model of text alone.
            CheckpointError: transformers cannot load it, or not all of it.
        """
        where, transformers = choose_device(device), library("transformers")
        library("PIL")
        places = [find_place(each) for each in (name, base) if each]
        options = {"trust_remote_code": trusts, "local_files_only": True}
        try:
            processor = transformers.AutoProcessor.from_pretrained(places[-1], **options)
            auto = transformers.AutoModelForImageTextToText
            model, found = auto.from_pretrained(places[-1], dtype="auto", output_loading_info=True, **options)
            if len(places) > 1:
                model = library("peft", "pip install peft").PeftModel.from_pretrained(model, places[0])
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise _not_loaded(name, error) from error
        if missing := sorted(found["missing_keys"]):  # transformers draws them at random, and goes on
            what = f"transformers found no {some(missing)} in it"
            fix = "use the version that saved it, config.json's transformers_version, or a newer one"
            raise CheckpointError(what, where=name, fix=fix)
        if getattr(processor, "image_processor", None) is None:
            fix = "copy preprocessor_config.json from the model that it comes from; a text model sees no pictures"
            raise UnsupportedError("it has no image processor", where=name, fix=fix)
        tokenizer = processor.tokenizer
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
        return cls(name, model.to(where).eval(), processor)

    @contextmanager
    def edited(self, request: Request) -> Iterator[None]:
        """The model edited for the length of the block, with the numbers that ``apply`` would store."""
        if request != Request() and hasattr(self.model, "peft_config"):
            fix = "merge it first, or leave out the flags of an edit"
            raise UsageError("an adapter is not edited in memory", where=self.name, fix=fix)
        made = None if request == Request() else edit_loaded(self.model, request)
        try:
            yield
        finally:
            if made is not None:
                made.restore()

    def prompt(self, text: str, flag: str = "--prompt") -> str:
        """What the processor is given: ``text`` where it has the image token, else the chat template's."""
        token, tokenizer = getattr(self.processor, "image_token", None) or "<image>", self.processor.tokenizer
        if token in text:
            return text
        if not (self.processor.chat_template or tokenizer.chat_template):
            fix = f"write prompts in full: --prompt '{token} describe' --question '{token} is there a {{object}}?'"
            what = f"it lacks {token}, which a model that has no chat template must be given"
            raise UnsupportedError(what, where=flag, fix=fix)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return str(self.processor.apply_chat_template([turn], add_generation_prompt=True))

    def check(self, protocol: Protocol) -> None:
        """Raise :class:`UnsupportedError` where the model cannot be asked so."""
        self.prompt(protocol.prompt)
        if protocol.questions:
            self.prompt(protocol.question, "--question")
            self.spellings("yes"), self.spellings("no")

    def captions(self, pictures: Sequence[Path], protocol: Protocol) -> list[dict[str, Any]]:
        """Greedy captions and the next-token distributions after the prompt, as fields of a record."""
        rows, log_p, margins = self._ask(pictures, [protocol.prompt] * len(pictures), protocol.max_new_tokens)
        said, decode = [], self.processor.tokenizer.decode
        for row, likeliest, left in zip(rows.tolist(), _likeliest(log_p), margins.T.tolist(), strict=True):
            n = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            caption, stops = decode(row[:n], skip_special_tokens=True).strip(), list[tuple[float, int]]()
            for i, margin in enumerate(left[:n]):
                if not stops or margin < stops[-1][0]:
                    stops.append((margin, len(decode(row[:i], skip_special_tokens=True).strip())))
            if n == len(row) and not protocol.keep_unfinished:
                caption = whole_sentences(caption)
            one = {"caption": caption, "finished": n < len(row), "tokens": n, "next_tokens": likeliest}
            said.append({**one, "stops": stops})
        return said

    @property
    def _ends(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        return [ends] if isinstance(ends, int) else list(ends or ())

    def yes(self, pictures: Sequence[Path], asked: Sequence[str]) -> list[float]:
        """``P(yes) / (P(yes) + P(no))`` of the first token of the answer, in all spellings of one token."""
        _, log_p, _ = self._ask(pictures, asked, 1)
        yes, no = (log_p[:, self.spellings(word)].logsumexp(-1) for word in ("yes", "no"))
        return [float(f"{p:.7g}") for p in self._finite(torch.sigmoid(yes - no)).tolist()]

    def spellings(self, word: str) -> list[int]:
        """The tokens that are a word by themselves, ``yes``, ``Yes``, `` YES``; none is :class:`UnsupportedError`."""
        tokenizer = self.processor.tokenizer
        written = [before + w for before in ("", " ") for w in (word, word.capitalize(), word.upper())]
        said = [tokenizer(text, add_special_tokens=False).input_ids for text in written]
        found = {ids[0] for ids in said if len(ids) == 1} - {tokenizer.unk_token_id}
        if not found:
            fix = "--questions 0 asks nothing"
            raise UnsupportedError(f"{word!r} is no single token of its own", where=self.name, fix=fix)
        return sorted(found)

    @torch.inference_mode()
    def _ask(self, pictures: Sequence[Path], asked: Sequence[str], n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of the answers, (pictures, at most ``n``), the log-probabilities of their first ones, and margins.

        A margin is how far the end lies below the likeliest token, (steps, pictures): the bias that would choose it.
        """
        text, tokenizer = [self.prompt(each) for each in asked], self.processor.tokenizer
        first, margins = list[Tensor](), list[Tensor]()

        def keep(ids: Tensor, scores: Tensor) -> Tensor:
            first.extend([] if first else [scores.float().log_softmax(-1).cpu()])
            ends = scores[:, self._ends].amax(-1) if self._ends else scores.amin(-1)
            margins.append((scores.amax(-1) - ends).float().clamp(max=1e9).cpu())
            return scores

        with _memory(len(pictures)):
            inputs = self.processor(
                images=[[open_picture(path)] for path in pictures], text=text, return_tensors="pt", padding=True,
                add_special_tokens=not (tokenizer.bos_token and text[0].startswith(tokenizer.bos_token)),
            ).to(self.model.device, self.model.dtype)  # fmt: skip
            rows = self.model.generate(
                **inputs, max_new_tokens=n, do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=None,
                top_p=None, top_k=None, logits_processor=[keep], pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        self._finite(first[0].amax(-1))
        return rows[:, inputs["input_ids"].shape[1] :], first[0], torch.stack(margins)

    @torch.inference_mode()
    def read(self, text: str) -> tuple[list[float], list[Mapping[str, float]]]:
        """The loss of each token of a text (nats) and the distribution that it was drawn from, window by window."""
        tokenizer, config = self.processor.tokenizer, self.model.config.get_text_config()
        window = min(WINDOW, getattr(config, "max_position_embeddings", WINDOW))
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:MOST_TOKENS])
        losses: list[float] = []
        likeliest: list[Mapping[str, float]] = []
        for part in torch.split(ids, window - 1):
            row = torch.tensor([*start, *part.tolist()], device=self.model.device)
            with _memory(1):
                log_p = self.model(input_ids=row[None]).logits[0, :-1].float().log_softmax(-1)
            losses += self._finite(-log_p.gather(1, row[1:, None])[:, 0]).tolist()
            likeliest += _likeliest(log_p)
        return losses, likeliest

    def _finite(self, said: Tensor) -> Tensor:
        if not bool(said.isfinite().all()):
            fix = "try another device, or a checkpoint in another dtype"
            raise CheckpointError("the model computes NaN or Inf", where=self.name, fix=fix)
        return said


def open_picture(path: Path) -> Any:
    """A picture, all of it, in red, green and blue; one that cannot be read is a :class:`UsageError`."""
    image = library("PIL.Image")
    try:
        with image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        fix = "download it again, or take it out of --objects"
        raise UsageError(f"not a picture that can be read: {error}", where=str(path), fix=fix) from error


def library(name: str, cure: str = _EXTRA) -> Any:
    """A library that not everyone needs; one that is missing is a :class:`UsageError`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"this takes {name.partition('.')[0]}: {error}", where=name, fix=cure) from error


def find_place(name: str) -> Path:
    """The directory of a model; of a repository, in the Hub cache."""
    place = locate(name).path
    if place is None or not place.is_dir():
        raise UsageError("no directory that transformers could load", where=name, fix="name the directory")
    return place


def files_of(name: str, base: str = "") -> str:
    """What identifies the files of a model, and of what an adapter is made from, on all machines that see them."""
    files = [f for each in (name, base) if each for f in walk_files(find_place(each)).files.values()]
    return digest([[f.name, f.size, f.id.mtime_ns] for f in files])


def machine(device: str) -> dict[str, Any]:
    """What the bytes of an answer depend on besides the model and what is asked."""
    editor = Editor.on(device)
    versions = {"transformers": library("transformers").__version__, "PIL": library("PIL").__version__}
    return {"qkpatch": editor.tool.version, **versions, **editor.stack}


def base_of(name: str, models: Sequence[str]) -> str:
    """What an adapter was made from, of ``models`` or what it names itself, else :class:`UsageError`; or nothing."""
    if not (config := find_place(name) / ADAPTER).is_file():
        return ""
    said = str(load_json(source_file(config, ADAPTER).read(), str(config)).get("base_model_name_or_path"))
    manifest, others = recorded_in(config.parent), list[str]()
    # Without a manifest there is but the name to go by.
    given = [model for model in models if manifest is not None or Path(model).name == Path(said).name]
    for each in dict.fromkeys(one for one in (*given, said, *models) if one != name):
        with suppress(QKPatchError):
            found = find_place(each)
            if manifest is None or not manifest.foreign(open_stored(found)):
                return each
            others.append(each)
    what = f"the adapter's base, {said}, is not there; not it: {some(others, 3) or 'any other'}"
    raise UsageError(what, where=name, fix="name what it was made from: --against SOURCE")


def recorded_in(place: Path) -> Manifest | None:
    """The manifest in a model's directory, where there is one."""
    file = place / MANIFEST_NAME
    return Manifest.loads(source_file(file, file.name).read(), str(file)) if file.is_file() else None


def _not_loaded(name: str, error: Exception) -> QKPatchError:
    text = str(error).strip() or repr(error)
    if "trust_remote_code" in text:
        fix = "read its .py files; where you trust them, add --trust-remote-code"
        return UnsupportedError("it runs code of its own", where=name, fix=fix)
    if "Unrecognized configuration class" in text:
        what = "to transformers it is no model of pictures and text"
        return UnsupportedError(what, where=name, fix="name a vision-language model")
    fix = "check that this version of transformers knows it, and that processor and tokenizer files are there"
    return CheckpointError(f"transformers cannot load it: {text.splitlines()[0]}", where=name, fix=fix)


def _likeliest(log_p: Tensor) -> list[Mapping[str, float]]:
    values, ids = log_p.topk(min(LIKELIEST, log_p.shape[-1]))
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [{str(i): float(f"{v:.7g}") for i, v in zip(*row, strict=True) if v > -1e4} for row in rows]


@contextmanager
def _memory(n: int) -> Iterator[None]:
    """Say what helps where memory runs out while ``n`` pictures are looked at."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(said in str(error) for said in _STARVED):
            raise
        fix = f"--batch-size {n // 2}; with the same -o it goes on" if n > 1 else "take another --device"
        raise FileSystemError("memory ran out", where=f"{n} pictures at a time", fix=fix) from error
