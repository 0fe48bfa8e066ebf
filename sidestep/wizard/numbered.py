"""Questions as numbered lines, answered by typing: for plain mode and for terminals that cannot move a cursor."""

from typing import Any

from sidestep.terminal.lines import as_typed
from sidestep.terminal.terminal import Terminal
from sidestep.wizard.questionnaire import BACK, Choice, Prompt

YES, NO = ("y", "yes", "on", "true", "1"), ("n", "no", "off", "false", "0")


class NumberedAsk:
    """Asks on a plain terminal. Enter takes what stands in brackets, `b` goes back, Ctrl-C or the end of input leaves."""

    def __init__(self, terminal: Terminal):
        self.terminal = terminal

    def __call__(self, prompt: Prompt) -> Any:
        say = self.terminal.say
        place = " | ".join(
            part
            for part in (prompt.title, prompt.section, f"{prompt.step} of {prompt.steps}" if prompt.steps > 1 else "")
            if part
        )
        say()
        if place:
            say(place)
        if prompt.error:
            say(f"  Not taken: {prompt.error}")
        say(prompt.text + (f" ({prompt.help})" if prompt.help else ""))
        for number, choice in enumerate(prompt.choices, 1):
            say(f"  {number}) {choice.title}" + (f" - {choice.note}" if choice.note else ""))
        typed = self._line(self._suggestion(prompt))
        if typed == "b":
            return BACK
        return self._reply(prompt, typed)

    def _suggestion(self, prompt: Prompt) -> str:
        if prompt.kind == "yes-no":
            return "y" if prompt.default else "n"
        titles = {choice.value: str(number) for number, choice in enumerate(prompt.choices, 1)}
        if prompt.kind == "choice":
            return titles.get(prompt.default, "")
        if prompt.kind == "several":
            return " ".join(titles.get(value, "") for value in prompt.default or ())
        return "" if prompt.default in ("", None) else as_typed(prompt.default)

    def _line(self, suggestion: str) -> str:
        print(
            f"[{suggestion}] (b: back) > " if suggestion else "(b: back) > ", end="", file=self.terminal.out, flush=True
        )
        line = self.terminal.source.readline()
        if not line:
            raise KeyboardInterrupt  # nobody is there any more
        return line.strip()

    def _reply(self, prompt: Prompt, typed: str) -> Any:
        if not typed:
            return prompt.default
        if prompt.kind == "yes-no":
            return typed.lower() in YES if typed.lower() in YES + NO else self._again(prompt, typed)
        if prompt.kind == "several":
            return tuple(
                _chosen(prompt.choices, word) for word in ([] if typed == "none" else typed.replace(",", " ").split())
            )
        return _chosen(prompt.choices, typed) if prompt.choices else typed

    def _again(self, prompt: Prompt, typed: str) -> Any:
        self.terminal.say(f"  Not taken: {typed}. Type y or n.")
        return self(prompt)


def _chosen(choices: tuple[Choice, ...], typed: str) -> Any:
    """The value of a number, or of a title typed out; what fits neither is left for `read` to judge."""
    if typed.isdigit() and 1 <= int(typed) <= len(choices):
        return choices[int(typed) - 1].value
    return next(
        (choice.value for choice in choices if typed.lower() in (choice.title.lower(), str(choice.value).lower())),
        typed,
    )
