"""Going through questions, forwards and back: pure, so that it can be tested with a scripted `ask`."""

from collections.abc import Callable
from typing import Any

from sidestep.errors import UserError
from sidestep.wizard.questions import BACK, Ask, Question


class Walk:
    """A path through questions.

    `remembered` holds every reply ever given here, also those stepped back over: they are the defaults when asked again.
    A reply that changes an answer drops the replies that depended on it. What is in `known` is not asked.
    """

    def __init__(self, questions: list[Question], known: dict[str, Any] | None = None, title: str = "", say: Callable[[str], None] = lambda line: None):
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
