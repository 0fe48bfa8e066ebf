"""Questions with cursor keys, by questionary. Esc (or `b`) goes back, Ctrl-C leaves."""

from typing import Any

import questionary
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style
from questionary.prompts.common import Choice as Line
from rich.text import Text

from sidestep.errors import UserError
from sidestep.terminal.rich_terminal import RichTerminal
from sidestep.terminal.terminal import as_typed
from sidestep.wizard.questionnaire import BACK, Prompt

SEARCH_FROM = 15  # with as many choices, typing searches instead of `b` going back
ESCAPE_SECONDS = 0.08  # how long a lone Esc waits to see whether it starts an arrow key; ssh needs a little
STYLE = Style(
    [
        ("qmark", "fg:ansicyan bold"),
        ("question", "bold"),
        ("answer", "fg:ansicyan"),
        ("pointer", "fg:ansicyan bold"),
        ("highlighted", "fg:ansicyan bold"),
        ("selected", "noreverse"),  # the pointer marks the line; reversed, two lines would look chosen
    ]
)
MARK = "?"


class QuestionaryAsk:
    """Asks in a terminal that Rich and questionary can draw on."""

    def __init__(self, terminal: RichTerminal):
        self.terminal = terminal
        self._typed = ""  # in the question before, to be put right where it was refused

    def __call__(self, prompt: Prompt) -> Any:
        self._show(prompt)
        question = self._question(prompt)
        app = question.application
        app.key_bindings = merge_key_bindings([app.key_bindings, self._back_keys(prompt)])
        app.ttimeoutlen = app.timeoutlen = ESCAPE_SECONDS
        reply = question.unsafe_ask()
        self._typed = reply if isinstance(reply, str) else ""
        if reply is BACK or (not prompt.choices and self._typed.strip() == "b"):
            return BACK
        return tuple(reply) if prompt.kind == "several" else reply

    def _show(self, prompt: Prompt) -> None:
        console = self.terminal.console
        heading = " / ".join(part for part in (prompt.title, prompt.section) if part)
        step = f"{prompt.step} of {prompt.steps}" if prompt.steps > 1 else ""
        console.print()
        if heading or step:
            console.print(Text.assemble((heading, "cyan"), (f"  {step}" if step else "", "dim")))
        if prompt.help:
            console.print(Text(prompt.help, style="dim"))
        if prompt.error:
            console.print(Text(f"Not taken: {prompt.error}", style="yellow"))

    def _question(self, prompt: Prompt) -> questionary.Question:
        look = {"qmark": MARK, "style": STYLE}
        match prompt.kind:
            case "choice":
                search = len(prompt.choices) >= SEARCH_FROM
                keys = "type to search, Enter, Esc: back" if search else "arrows, Enter, Esc: back"
                lines = [Line(self._title(choice.title, choice.note), choice.value) for choice in prompt.choices]
                default = next((line for line in lines if line.value == prompt.default), None)
                return questionary.select(
                    prompt.text,
                    lines,
                    default=default,
                    use_jk_keys=not search,
                    use_search_filter=search,
                    instruction=f"({keys})",
                    pointer=">",
                    **look,
                )
            case "several":
                lines = [
                    Line(choice.title, choice.value, checked=choice.value in (prompt.default or ()))
                    for choice in prompt.choices
                ]
                return questionary.checkbox(
                    prompt.text, lines, instruction="(Space: on/off, Enter, Esc: back)", pointer=">", **look
                )
            case "yes-no":
                return questionary.confirm(prompt.text, default=bool(prompt.default), **look)
        typed = "" if prompt.default in ("", None) else as_typed(prompt.default)
        typed = self._typed if prompt.error else typed
        arguments = {"default": typed, "validate": lambda text: _taken(prompt, text)} | look
        if prompt.kind == "path" and prompt.choices:
            return questionary.autocomplete(
                prompt.text, [str(choice.value) for choice in prompt.choices], match_middle=True, **arguments
            )
        return (
            questionary.path(prompt.text, **arguments)
            if prompt.kind == "path"
            else questionary.text(prompt.text, **arguments)
        )

    def _title(self, title: str, note: str) -> str:
        room = self.terminal.width - len(title) - 8
        if not note or room < 12:
            return title
        return f"{title}  {note}" if len(note) <= room else f"{title}  {note[: room - 3]}..."

    def _back_keys(self, prompt: Prompt) -> KeyBindings:
        bindings = KeyBindings()

        def back(event: KeyPressEvent) -> None:
            if not event.app.is_done:
                event.app.erase_when_done = True  # a question stepped back over leaves no half line
                event.app.exit(result=BACK)

        def accept(event: KeyPressEvent) -> None:
            """Enter takes what is typed, unless a completion is being picked; questionary would need it twice."""
            buffer = event.current_buffer
            picking = buffer.complete_state is not None and buffer.complete_state.current_completion is not None
            buffer.complete_state = None
            if not picking and buffer.validate(set_cursor=True):
                event.app.exit(result=buffer.text)

        bindings.add(Keys.Escape, eager=True)(back)
        if prompt.kind == "path":
            bindings.add(Keys.ControlM, eager=True)(accept)
        if prompt.kind in ("yes-no", "several") or (prompt.kind == "choice" and len(prompt.choices) < SEARCH_FROM):
            bindings.add("b", eager=True)(back)
        return bindings


def _taken(prompt: Prompt, text: str) -> bool | str:
    """True, or the reason why this text is not taken; `b` is always taken, as the way back."""
    if text.strip() == "b":
        return True
    try:
        prompt.read(text)
    except UserError as error:
        return f"{error.problem} {error.fix}".replace("\n", " ").strip()
    return True
