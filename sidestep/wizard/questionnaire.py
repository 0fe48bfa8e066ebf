"""A question as data, and how one is made from a setting.

Going through questions, forwards and back: pure, so that it can be tested with a scripted `ask`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.settings.option import Option, splits_at_commas

Answers = Mapping[str, Any]


class Move(Enum):
    """A reply that is no answer."""

    BACK = "back"


BACK = Move.BACK


@dataclass(frozen=True)
class Choice:
    """One line of a list. `note`: a few words on what it means."""

    value: Any
    title: str
    note: str = ""


@dataclass(frozen=True)
class Prompt:
    """A question as it is asked now, complete: what a person sees and how the reply becomes a value.

    `kind`: text, path, choice, several or yes-no. `read` takes what was typed or chosen and raises UserError with the reason why not.
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


Ask = Callable[[Prompt], Any]  # the reply as typed or chosen, or BACK; Ctrl-C raises KeyboardInterrupt


def _as_is(reply: Any, _answers: Answers) -> Any:
    return reply


@dataclass(frozen=True)
class Question:
    """A question of a flow. The functions see the answers given before it.

    `depends_on`: answers that, when changed, make an earlier reply to this question void.
    `tell`: one line about the value taken ("12 songs, 47 min").
    """

    name: str
    text: str
    help: str = ""
    kind: str = "text"
    section: str = ""
    default: Callable[[Answers], Any] = lambda answers: ""
    choices: Callable[[Answers], tuple[Choice, ...]] = lambda answers: ()
    read: Callable[[Any, Answers], Any] = _as_is
    when: Callable[[Answers], bool] = lambda answers: True
    tell: Callable[[Any, Answers], str] = lambda value, answers: ""
    depends_on: tuple[str, ...] = ()

    def asked(self, answers: Answers, default: Any, **place: Any) -> Prompt:
        """The prompt that asks this now."""
        choices = self.choices(answers)
        return Prompt(
            self.name,
            self.text,
            self.help,
            self.kind,
            default,
            choices,
            lambda reply: self.read(_within(self, choices, reply), answers),
            section=self.section,
            **place,
        )


def _within(question: Question, choices: tuple[Choice, ...], reply: Any) -> Any:
    values = [choice.value for choice in choices]
    if question.kind == "choice" and reply not in values:
        raise UserError(f"{reply} is not in the list.")
    if question.kind == "several" and not set(reply) <= set(values):
        raise UserError(f"{' '.join(map(str, reply))}: not all of these are in the list.")
    return reply


LABELS = {  # where the flag's own words would puzzle
    "checkpoint_dir": "Folder of the checkpoints",
    "dataset_dir": "Folder of training tensors",
    "tensor_output": "Folder for the training tensors",
    "output_dir": "Folder for the results",
    "input": "Folder of songs",
    "audio_dir": "Folder of songs",
    "tag": "Trigger word",
    "prompt": "Caption of the music",
    "lr": "Learning rate",
}
KINDS = {bool: "yes-no", Path: "path"}


def from_option(o: Option, default: Callable[[Answers], Any], **more: Any) -> Question:
    """The question that a setting asks. An empty reply means "none" where that is allowed."""
    kind = ("several" if o.many else "choice") if o.choices else KINDS.get(o.type, "text")
    if kind == "several" and o.optional:
        kind = "text"  # a list of boxes has no box for "not set"

    def read(reply: Any, _answers: Answers) -> Any:
        if isinstance(reply, str):
            reply = reply.strip()
            if reply in ("", "-") and (o.optional or (o.type is str and not o.choices and not o.required)):
                return None if o.optional else ""
            if not reply and o.required:
                raise UserError("This one needs an answer.")
            if o.many:
                reply = reply.replace(",", " ").split() if splits_at_commas(o) else reply.split()
                if o.type is str and any(word.startswith("-") for word in reply):
                    raise UserError("A word that begins with - would be read as a flag.")
        try:
            return o.check(reply)
        except UserError as error:
            raise UserError(error.problem.partition(": ")[2] or error.problem) from None

    def choices(_answers: Answers) -> tuple[Choice, ...]:
        unset = (Choice(None, "not set"),) if o.optional and kind == "choice" else ()
        return (*unset, *(Choice(value, value) for value in o.choices))

    label = LABELS.get(o.name, o.name.replace("_", " "))
    help = o.help + (f" ({', '.join(o.choices)}; empty: not set)" if o.many and o.choices and kind == "text" else "")
    arguments = {
        "text": label[:1].upper() + label[1:],
        "help": help,
        "kind": kind,
        "section": o.group,
        "choices": choices,
        "read": read,
    } | more
    return Question(o.name, default=default, **arguments)


class Walk:
    """A path through questions.

    `remembered` holds every reply ever given here, also those stepped back over: they are the defaults when asked again.
    A reply that changes an answer drops the replies that depended on it. What is in `known` is not asked.
    """

    def __init__(
        self,
        questions: list[Question],
        known: dict[str, Any] | None = None,
        title: str = "",
        say: Callable[[str], None] = lambda line: None,
    ):
        self.questions, self.known, self.title, self.say = questions, dict(known or {}), title, say
        self.remembered: dict[str, Any] = {}
        self._path: list[int] = []
        self._next = 0

    @property
    def answers(self) -> dict[str, Any]:
        """What is known, and the answers on the path so far."""
        return self.known | {self.questions[i].name: self.remembered[self.questions[i].name] for i in self._path}

    def forward(self, ask: Ask) -> dict[str, Any] | None:
        """Ask from where the path ends until there is nothing left to ask; the answers, or None for a step back over the first question."""
        error = ""
        while self._next < len(self.questions):
            question, answers = self.questions[self._next], self.answers
            if not self._open(question, answers):
                self._next += 1
                continue
            default = self.remembered[question.name] if question.name in self.remembered else question.default(answers)
            left = sum(self._open(later, answers) for later in self.questions[self._next :])
            step = len(self._path) + 1
            prompt = question.asked(answers, default, title=self.title, step=step, steps=step - 1 + left, error=error)
            error = ""
            reply = ask(prompt)
            if reply is BACK:
                if not self.back():
                    return None
                continue
            try:
                value = prompt.read(reply)
            except UserError as refused:
                error = f"{refused.problem} {refused.fix}".strip()
                continue
            self._take(question, value)
            if line := question.tell(value, answers):
                self.say(line)
        return self.answers

    def back(self) -> bool:
        """Step back to the question answered last; False where there is none."""
        if not self._path:
            return False
        self._next = self._path.pop()
        return True

    def _open(self, question: Question, answers: dict[str, Any]) -> bool:
        return question.name not in self.known and question.when(answers)

    def _take(self, question: Question, value: Any) -> None:
        if question.name in self.remembered and self.remembered[question.name] != value:
            changed = {question.name}
            for later in self.questions[self._next + 1 :]:
                if changed & set(later.depends_on):
                    changed.add(later.name)
                    self.remembered.pop(later.name, None)
        self.remembered[question.name] = value
        self._path.append(self._next)
        self._next += 1
