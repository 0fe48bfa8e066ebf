"""Questions as numbered lines, answered by typing: for plain mode and for terminals that cannot move a cursor."""

from contextlib import suppress
from typing import Any

from sidestep.settings.option import Choice
from sidestep.terminal.terminal import Terminal, as_typed
from sidestep.wizard.questionnaire import BACK, NEWS, Prompt

YES, NO = ("y", "yes", "on", "true", "1"), ("n", "no", "off", "false", "0")


class NumberedAsk:
    """Asks on a plain terminal. Enter takes what is in brackets, `b` goes back, `?` tells more, Ctrl-C leaves.

    So does the end of input.
    """

    def __init__(self, terminal: Terminal):
        self.terminal = terminal

    def __call__(self, prompt: Prompt) -> Any:
        print_line = self.terminal.print
        if prompt.news:  # a line that is being typed cannot be left, so the question comes after
            with suppress(KeyboardInterrupt):
                prompt.news.wait()
            return NEWS
        step = f"question {prompt.step}" if prompt.steps > 1 else ""
        print_line()
        if heading := " | ".join(part for part in (prompt.title, prompt.section, step) if part):
            print_line(heading)
        if prompt.error:
            print_line(f"  Not taken: {prompt.error}")
        print_line(prompt.text + (f" ({prompt.help})" if prompt.help else ""))
        for number, choice in enumerate(prompt.choices, 1):
            print_line(f"  {number}) {choice.title}" + (f" - {choice.note}" if choice.note else ""))
        suggestion = _suggestion(prompt)
        while True:
            keys = "(b: back, ?: more)" if prompt.more else "(b: back)"
            line = f"[{suggestion}] {keys} > " if suggestion else f"{keys} > "
            print(line, end="", file=self.terminal.out, flush=True)
            line = self.terminal.source.readline()
            if not line:
                raise KeyboardInterrupt  # nobody is there any more
            typed = line.strip()
            if typed == "b":
                return BACK
            if typed == "?" and prompt.more:
                print_line(prompt.more)
                continue
            if not typed:
                return prompt.default
            if prompt.kind == "several":
                words = [] if typed == "none" else typed.replace(",", " ").split()
                return tuple(_value_of(word, prompt.choices) for word in words)
            if prompt.kind != "yes-no":
                return _value_of(typed, prompt.choices)
            if typed.lower() in YES + NO:
                return typed.lower() in YES
            print_line(f"  Not taken: {typed}. Type y or n.")


def _suggestion(prompt: Prompt) -> str:
    numbers = {choice.value: str(number) for number, choice in enumerate(prompt.choices, 1)}
    match prompt.kind:
        case "yes-no":
            return "y" if prompt.default else "n"
        case "choice":
            return numbers.get(prompt.default, "")
        case "several":
            return " ".join(numbers.get(value, "") for value in prompt.default or ())
    return "" if prompt.default in ("", None) else as_typed(prompt.default)


def _value_of(typed: str, choices: tuple[Choice, ...]) -> Any:
    """The value of a number, a title, or the only title with these letters; else `read` refuses what was typed."""
    if typed.isdigit() and 1 <= int(typed) <= len(choices):
        return choices[int(typed) - 1].value
    words = typed.lower()
    named = [choice for choice in choices if words in (choice.title.lower(), str(choice.value).lower())]
    parts = named or [choice for choice in choices if words in choice.title.lower()]
    return parts[0].value if len(parts) == 1 or named else typed
