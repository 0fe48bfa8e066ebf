"""Questions as data, how one is made from a setting, and the way through them, forwards and back.

Pure: who asks is passed in, so that all of it can be tested with a scripted `ask`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from threading import Event
from typing import Any

from sidestep.errors import UserError
from sidestep.settings.option import Answers, Choice, Option, splits_at_commas
from sidestep.settings.path_checks import Check, glance, path_of


class Move(Enum):
    """A reply that is no answer: one step back, or what was waited for is there."""

    BACK = "back"
    NEWS = "news"


BACK, NEWS = Move.BACK, Move.NEWS


@dataclass(frozen=True)
class Prompt:
    """A question as it is asked now, complete: what a person sees and how the reply becomes a value.

    `kind`: text, path, choice, several or yes-no. `read` takes what was typed or chosen and raises UserError with the
    reason why not; it is cheap enough for every key.
    """

    name: str
    text: str
    help: str
    kind: str
    default: Any
    choices: tuple[Choice, ...]
    read: Callable[[Any], Any]
    title: str = ""  # of the flow
    section: str = ""
    step: int = 1
    steps: int = 1
    error: str = ""  # why the last reply was not taken
    more: str = ""  # what `?` tells
    news: Event | None = None  # once it is set the reply is NEWS, as soon as the asker can


Ask = Callable[[Prompt], Any]  # the reply as typed or chosen, BACK or NEWS; Ctrl-C raises KeyboardInterrupt


@dataclass(frozen=True)
class Question:
    """A question of a flow. The functions see the answers given before it.

    `typed`: the kind of question where there is nothing to choose from. `why`: what to add to `help`.
    `verify`: the real check of a value, once it is entered: a line about it ("12 songs, 47:10"), or UserError.
    `depends_on`: answers that, when changed, make an earlier reply to this question void.
    `on_disk`: the answer is something found on disk, which one flow hands on to the next.
    """

    name: str
    text: str
    help: str = ""
    kind: str = "text"
    section: str = ""
    default: Callable[[Answers], Any] = lambda _answers: ""
    choices: Callable[[Answers], tuple[Choice, ...]] = lambda _answers: ()
    read: Callable[[Any, Answers], Any] = lambda reply, _answers: reply
    verify: Callable[[Any, Answers], str] = lambda _value, _answers: ""
    when: Callable[[Answers], bool] = lambda _answers: True
    depends_on: tuple[str, ...] = ()
    typed: str = "choice"
    why: Callable[[Answers], str] = lambda _answers: ""
    on_disk: bool = False
    more: str = ""

    def asked(self, answers: Answers, default: Any, **place: Any) -> Prompt:
        """The prompt that asks this now."""
        choices = self.choices(answers)
        values = [choice.value for choice in choices]
        kind = self.kind if choices or self.kind != "choice" else self.typed

        def read(reply: Any) -> Any:
            if kind == "choice" and reply not in values:
                raise UserError(f"{reply} is not in the list.")
            if kind == "several" and not set(reply) <= set(values):
                raise UserError(f"{' '.join(map(str, reply))}: not all of these are in the list.")
            return self.read(reply, answers)

        help = " ".join(filter(None, (self.help, self.why(answers))))
        return Prompt(
            self.name, self.text, help, kind, default, choices, read, section=self.section, more=self.more, **place
        )


def choose(
    name: str,
    text: str,
    choices: tuple[Choice, ...],
    *,
    default: Any = None,
    section: str = "",
    when: Callable[[Answers], bool] = lambda _answers: True,
    help: str = "",
    more: str = "",
) -> Question:
    """A question with these choices, by default the first."""
    first = choices[0].value if default is None else default
    return Question(
        name,
        text,
        help,
        "choice",
        section,
        default=lambda _answers: first,
        choices=lambda _answers: choices,
        when=when,
        more=more,
    )


def needed(reply: Any, _answers: Answers) -> str:
    """What was typed. Raises UserError for nothing."""
    text = str(reply).strip()
    if not text:
        raise UserError("This one needs an answer.")
    return text


def from_option(
    o: Option, default: Callable[[Answers], Any], check: Check = lambda _holds, _path: "", **changes: Any
) -> Question:
    """The question that a setting asks; `changes` are fields of Question. An empty reply is none where that may be.

    `check`: the real check of a path, made once it is entered.
    """
    kind = {bool: "yes-no", Path: "path"}.get(o.type, "text")
    if o.choices or o.offers:
        kind = "choice" if not o.many else "text" if o.optional else "several"  # boxes have none for "not set"

    def read(reply: Any, _answers: Answers) -> Any:
        if isinstance(reply, str):
            reply = path_of(reply) if o.type is Path else reply.strip()
            if reply in ("", "-") and (o.optional or (o.type is str and not o.choices and not o.required)):
                return None if o.optional else ""
            if not reply and o.required:
                raise UserError("This one needs an answer.")
            if o.many:
                reply = reply.replace(",", " ").split() if splits_at_commas(o) else reply.split()
                if o.type is str and any(word.startswith("-") for word in reply):
                    raise UserError("A word that begins with - would be read as a flag.")
        try:
            value = o.check(reply)
        except UserError as error:
            raise UserError(error.problem.partition(": ")[2] or error.problem) from None
        if o.holds and value is not None:
            glance(o.holds, value)
        return value

    def choices(answers: Answers) -> tuple[Choice, ...]:
        if o.offers:
            return o.offers(answers)
        unset = (Choice(None, "not set"),) if o.optional and kind == "choice" else ()
        return (*unset, *(Choice(v, v, note) for v, note in itertools.zip_longest(o.choices, o.notes, fillvalue="")))

    listed = f" ({', '.join(o.choices)}; empty: not set)" if o.many and o.choices and kind == "text" else ""
    fields: dict[str, Any] = {
        "text": o.title,
        "help": (o.plain or o.help) + listed,
        "more": o.more,
        "kind": kind,
        "section": o.group,
        "choices": choices,
        "read": read,
        "verify": lambda value, _answers: check(o.holds, value) if o.holds and value is not None else "",
        "depends_on": (*o.depends_on, *o.when[:1]),
        "typed": "path" if o.type is Path else "text",
        "on_disk": o.type is Path or o.offers is not None,
    }
    return Question(o.name, default=default, **(fields | changes))


class Questionnaire:
    """A path through questions.

    `remembered` holds every reply ever given here, also those stepped back over: the defaults when asked again.
    A reply that changes an answer drops the replies that depended on it. What is in `known` is not asked.
    """

    def __init__(
        self,
        questions: list[Question],
        known: dict[str, Any] | None = None,
        title: str = "",
        tell: Callable[[str], None] = lambda _line: None,
    ):
        self.questions, self.known, self.title, self.tell = questions, dict(known or {}), title, tell
        self.remembered: dict[str, Any] = {}
        self._path: list[int] = []
        self._next = 0

    @property
    def answers(self) -> dict[str, Any]:
        """What is known, and the answers on the path so far."""
        return self.known | {self.questions[i].name: self.remembered[self.questions[i].name] for i in self._path}

    def forward(self, ask: Ask) -> dict[str, Any] | None:
        """Ask from where the path ends until there is nothing left to ask.

        Returns the answers, or None for a step back over the first question.
        """
        error = ""
        while self._next < len(self.questions):
            question, answers = self.questions[self._next], self.answers
            if not self._is_open(question, answers):
                self._next += 1
                continue
            default = self.remembered[question.name] if question.name in self.remembered else question.default(answers)
            left = sum(self._is_open(later, answers) for later in self.questions[self._next :])
            step = len(self._path) + 1
            prompt = question.asked(answers, default, title=self.title, step=step, steps=step - 1 + left, error=error)
            reply, error = ask(prompt), ""
            if reply is BACK:
                if not self.back():
                    return None
                continue
            if reply is NEWS:
                return self.answers | {question.name: NEWS}
            try:
                value = prompt.read(reply)
                line = question.verify(value, answers)
            except UserError as refused:
                error = f"{refused.problem} {refused.fix}".strip()
                continue
            if self.remembered.get(question.name, value) != value:
                changed = {question.name}
                for later in self.questions[self._next + 1 :]:
                    if changed & set(later.depends_on):
                        changed.add(later.name)
                        self.remembered.pop(later.name, None)
            self.remembered[question.name] = value
            self._path.append(self._next)
            self._next += 1
            if line:
                self.tell(line)
        return self.answers

    def back(self) -> bool:
        """Step back to the question answered last; False where there is none."""
        if not self._path:
            return False
        self._next = self._path.pop()
        return True

    def _is_open(self, question: Question, answers: dict[str, Any]) -> bool:
        return question.name not in self.known and question.when(answers)


def ask_one(ask: Ask, question: Question, title: str = "", news: Event | None = None) -> Any:
    """The answer to a question that stands alone, BACK, or NEWS once that event is set."""
    answers = Questionnaire([question], title=title).forward(lambda prompt: ask(replace(prompt, news=news)))
    return BACK if answers is None else answers[question.name]
