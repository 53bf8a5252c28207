"""What is asked of every model, and the asking: picture by picture, written down as it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from qkpatch.checkpoint.tree import source_file
from qkpatch.common.number_ranges import format_ranges, some
from qkpatch.common.observer import Observer
from qkpatch.common.part import Part
from qkpatch.common.typed_json import as_json
from qkpatch.errors import UsageError
from qkpatch.evaluation.annotations import Annotations, read_annotations
from qkpatch.evaluation.pope import KINDS, questions
from qkpatch.evaluation.records import Inputs, LogP, Loss, Protocol, Record, Store, digest
from qkpatch.evaluation.subject import Subject, open_picture
from qkpatch.evaluation.vocabulary import Vocabulary
from qkpatch.planning.request import Request

TEXT = ":text"  # the key of what was read, beside pictures
KINDS_KEPT: dict[str, Any] = {TEXT: tuple[tuple[Loss, ...], tuple[Mapping[str, LogP], ...]], "": Record}


@dataclass(frozen=True)
class Task:
    """Pictures with what is in them, what is asked about them, and how."""

    pictures: Annotations
    vocabulary: Vocabulary
    questions: Mapping[str, Mapping[str, tuple[str, ...]]]  # by picture and kind; none where nothing is asked
    protocol: Protocol
    text: str | None
    batch_size: int

    @classmethod
    def of(cls, inputs: Inputs, protocol: Protocol) -> Task:
        """From files, all of which are read, pictures too: what is wrong with them is a :class:`UsageError` now."""
        every = read_annotations(Path(inputs.objects), Path(inputs.images))
        vocabulary = Vocabulary.of(every.names, inputs.vocabulary)
        chosen = every.drawn(protocol.sample, protocol.sample_seed)
        text, file = None, inputs.text
        if file is not None:
            text = source_file(file, file.name).read().decode("utf-8", "replace")
            if len(text.split()) < 2:
                raise UsageError("hardly a word is in it", where=str(file), fix="give a page of plain text")
        for name in chosen.present:
            open_picture(chosen.folder / name)
        asked = questions(chosen, protocol.questions, protocol.sample_seed) if protocol.questions else {}
        return cls(chosen, vocabulary, asked, protocol, text, inputs.batch_size)

    def at(self, names: Iterable[str], *, asks: bool = True) -> Task:
        """The same of some of the pictures, or only their captions."""
        asked = {name: self.questions[name] for name in sorted(names) if asks and self.questions}
        return replace(self, pictures=self.pictures.only(names), questions=asked)

    def share(self, part: Part) -> Task:
        """What is a part's: whole batches, as others would round, and the text as one more of them."""
        batches = [*_batches(list(self.pictures.present), self.batch_size), []]
        mine = batches[part.number - 1 :: part.total]
        names = [name for batch in mine for name in batch]
        return replace(self.at(names), text=self.text if [] in mine else None)

    @property
    def settings(self) -> dict[str, Any]:
        """What records of another run would differ in."""
        text = None if self.text is None else digest(self.text)
        return {"protocol": self.protocol.to_json(), "questions": digest(self.questions), "text": text}


@dataclass(frozen=True)
class Side:
    """All that one model said."""

    model: str
    edit: Mapping[str, Any] | None
    records: tuple[Record, ...]  # in the order of the pictures
    losses: tuple[float, ...]  # of the text's tokens, in nats
    reading: tuple[Mapping[str, float], ...]
    settings: Mapping[str, Any] | None = None  # this edit, or that of the model's own manifest

    @property
    def label(self) -> str:
        """What tables call it."""
        return ", ".join([self.model, *(f"{key} {value}" for key, value in (self.edit or {}).items())])


def told(request: Request) -> dict[str, Any] | None:
    """What a request says, as ``EDIT.yaml`` would have it; None where nothing is edited."""
    said = {key: value for key, value in as_json(request).items() if value is not None}
    return {**said, **{key: format_ranges(said[key]) for key in ("layers", "heads") if key in said}} or None


def measure(
    model: str, load: Callable[[], Subject], request: Request, task: Task, store: Store, observer: Observer
) -> Side:
    """Ask one model, loaded when it is needed first, everything that the store does not have yet."""
    pictures, text = list(task.pictures.present), task.text
    observer.begins(model, 0, len(pictures), "pictures")
    with ExitStack() as edits:

        @cache
        def subject() -> Subject:
            loaded = load()
            edits.enter_context(loaded.edited(request))
            return loaded

        for batch in _batches(pictures, task.batch_size):
            said = cache(partial(_ask, subject, batch, task))  # as a whole, as batches round alike
            for name in batch:
                store.once(name, partial(_of, said, name))
            observer.edited(len(batch))
        losses, reading = store.once(TEXT, lambda: subject().read(text)) if text else ((), ())
    if len(losses) != len(reading) or (text and not losses):
        raise store.damaged(f"{TEXT} has {len(losses)} losses and {len(reading)} distributions")
    records = tuple(Record(**store[name]) for name in pictures)
    for (name, kinds), record in zip(task.questions.items(), records, strict=True) if task.questions else ():
        if lacking := {thing for things in kinds.values() for thing in things} - record.answers.keys():
            raise store.damaged(f"{name} has no answer about {some(sorted(lacking), 3)}")
    return Side(model, told(request), records, tuple(losses), tuple(reading))


def _of(said: Callable[[], dict[str, Mapping[str, Any]]], name: str) -> Mapping[str, Any]:
    return said()[name]


def _ask(loaded: Callable[[], Subject], names: list[str], task: Task) -> dict[str, Mapping[str, Any]]:
    """Records of a batch, as JSON."""
    subject = loaded()
    paths = {name: task.pictures.folder / name for name in names}
    answers: dict[str, dict[str, float]] = {name: {} for name in names}
    said = subject.captions(list(paths.values()), task.protocol)
    kinds = ("present", *KINDS) if task.questions else ()
    every = {(name, thing) for name in names for kind in kinds for thing in task.questions[name][kind]}
    for part in _batches(sorted(every), task.batch_size):
        asked = [task.protocol.asked(thing) for _, thing in part]
        for (name, thing), p in zip(part, subject.yes([paths[n] for n, _ in part], asked), strict=True):
            answers[name][thing] = p
    return {name: {**one, "answers": answers[name]} for name, one in zip(names, said, strict=True)}


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
