"""Questions with cursor keys, by questionary. Esc (or `b`) goes back, `?` tells more, Ctrl-C leaves."""

import os
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event, Thread
from typing import Any

import questionary
from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Always
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent, merge_key_bindings
from prompt_toolkit.keys import Keys
from prompt_toolkit.styles import Style
from prompt_toolkit.validation import ThreadedValidator, ValidationError, Validator
from questionary.prompts.common import Choice as Line
from questionary.prompts.common import InquirerControl
from questionary.prompts.path import GreatUXPathCompleter
from rich.text import Text

from sidestep.errors import UserError
from sidestep.settings.option import Choice
from sidestep.terminal.rich_terminal import RichTerminal
from sidestep.terminal.terminal import as_typed
from sidestep.wizard.questionnaire import BACK, NEWS, Move, Prompt
from sidestep.words import visible

SEARCH_FROM = 20  # with as many choices, typing searches instead of digits choosing and `b` going back
SEARCHED = ("setting",)  # questions whose choices are searched, however few there are
MORE_KEY = "  (?: more)"
KNOWN_KEY = "  (down: choose)"
MORE = object()  # a reply that asks for more on the question
NUMBERED = 9  # choices that a digit takes
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


class QuestionaryAsk:
    """Asks in a terminal that Rich and questionary can draw on."""

    def __init__(self, terminal: RichTerminal):
        self.terminal = terminal
        self._was_left = False  # the question before, for news
        self._typed = ""  # in the question before, to be put right where it was refused

    def __call__(self, prompt: Prompt) -> Any:
        console = self.terminal.console
        heading = " / ".join(part for part in (prompt.title, prompt.section) if part)
        step = f"  question {prompt.step}" if prompt.steps > 1 else ""
        if not self._was_left:  # asked again, it has its heading
            console.print()
            if heading or step:
                console.print(Text.assemble((heading, "cyan"), (step, "dim")))
        if prompt.help:
            lines = textwrap.wrap(visible(prompt.help), self.terminal.width - 1, break_on_hyphens=False)
            more = (KNOWN_KEY if prompt.kind == "path" and prompt.choices else "") + (MORE_KEY if prompt.more else "")
            fits = len(lines[-1]) + len(more) < self.terminal.width
            text = "\n".join(lines) + more if fits else "\n".join([*lines, more.strip()])
            console.print(Text(text, style="dim"))
        if prompt.error:
            console.print(Text(f"Not taken: {visible(prompt.error)}", style="yellow"))
        typed = "" if prompt.default in ("", None) else as_typed(prompt.default)
        question = asked(prompt, self._typed if prompt.error else typed, self.terminal.width)
        app = question.application
        for window in app.layout.find_all_windows():
            if window.height == 1:  # the toolbar below that says why a text is not taken
                window.height, window.wrap_lines, window.dont_extend_height = None, Always(), Always()
        app.key_bindings = merge_key_bindings([app.key_bindings or KeyBindings(), keys_of(prompt)])
        app.ttimeoutlen = app.timeoutlen = ESCAPE_SECONDS
        if prompt.kind == "path" and prompt.choices:
            app.pre_run_callables.append(lambda: app.current_buffer.start_completion())
        if prompt.news:
            app.pre_run_callables.append(partial(leave_for_news, app, prompt.news))
        reply = question.unsafe_ask()
        self._was_left = reply in (NEWS, MORE)
        self._typed = reply if isinstance(reply, str) else ""
        if reply is MORE:
            console.print(Text(visible(prompt.more), style="dim"))
            return self(replace(prompt, help="", more=""))
        if isinstance(reply, Move):
            return reply
        if not prompt.choices and self._typed.strip() == "b":
            return BACK
        return tuple(reply) if prompt.kind == "several" else reply


def is_searched(prompt: Prompt) -> bool:
    """Whether typing searches the choices."""
    return len(prompt.choices) >= SEARCH_FROM or prompt.name in SEARCHED


def asked(prompt: Prompt, typed: str, width: int) -> questionary.Question:
    """The question as questionary asks it. `typed`: what its line begins with. `width`: columns of the terminal."""

    widest = max((len(choice.title) for choice in prompt.choices if choice.note), default=0)
    column = widest if widest <= width // 2 else 0  # where there is room, the notes stand below each other

    searched = is_searched(prompt)
    numbered = prompt.kind == "choice" and not searched

    def title(choice: Choice) -> str:
        number = prompt.choices.index(choice) + 1
        name = (f"{number if number <= NUMBERED else ' '}  " if numbered else "") + choice.title.ljust(column)
        if not choice.note:
            return name.rstrip()
        indent = min(len(name) + 2, max(4, width - 30)) + 3  # below its beginning, unless that leaves too little room
        note = textwrap.wrap(
            choice.note, width - 2, initial_indent=" " * (len(name) + 5), subsequent_indent=" " * indent
        )
        return f"{name}  {note[0].strip()}" + "".join(f"\n{line}" for line in note[1:])

    typing: dict[str, Any] = {"default": typed, "validate": ThreadedValidator(Readable(prompt, width)), "style": STYLE}
    match prompt.kind:
        case "choice":
            lines = [Line(title(choice), choice.value) for choice in prompt.choices]
            more = ", ?: more" if prompt.more and not prompt.help and not searched else ""
            choosing = ("type to search, Enter",) if searched else ("number, or arrows, Enter", "number")
            keys = (f"({first}, Esc: back{more})" for first in choosing)
            return questionary.select(
                prompt.text,
                lines,
                default=next((line for line in lines if line.value == prompt.default), None),
                use_jk_keys=not searched,
                use_search_filter=searched,
                instruction=next((line for line in keys if len(prompt.text) + len(line) + 4 < width), " "),
                pointer=">",
                style=STYLE,
            )
        case "several":
            on = prompt.default or ()
            lines = [Line(choice.title, choice.value, checked=choice.value in on) for choice in prompt.choices]
            keys = "(Space: on/off, Enter, Esc: back)"
            return questionary.checkbox(prompt.text, lines, instruction=keys, pointer=">", style=STYLE)
        case "yes-no":
            return questionary.confirm(prompt.text, default=bool(prompt.default), style=STYLE)
        case "path":
            paths = Paths(prompt.choices, typed)
            return questionary.autocomplete(prompt.text, [], completer=paths, complete_in_thread=True, **typing)
    return questionary.text(prompt.text, **typing)


def leave_for_news(app: Application, news: Event) -> None:
    """End a question that has begun, leaving no line of it, once what was waited for is there."""
    loop = app.loop
    assert loop is not None

    def leave() -> None:
        if app.is_running and not app.is_done:
            app.erase_when_done = True
            app.exit(result=NEWS)

    def wait() -> None:
        news.wait()
        with suppress(RuntimeError):  # answered meanwhile, and its loop is closed
            loop.call_soon_threadsafe(leave)

    Thread(target=wait, daemon=True).start()


class Paths(Completer):
    """The known paths, as long as only the suggestion is there; then those with the letters typed, and the disk's."""

    def __init__(self, known: tuple[Choice, ...], suggestion: str):
        self.known, self.suggestion = known, suggestion
        self.disk = GreatUXPathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        typed = document.text_before_cursor
        is_typing = typed != self.suggestion or not self.known
        for choice in self.known:
            path = str(choice.value)
            if not is_typing or typed.lower() in path.lower():
                yield Completion(path, -len(typed), display_meta=choice.note)
        if is_typing:
            yield from self.disk.get_completions(document, complete_event)


class Readable(Validator):
    """The cheap check of what is typed. It may ask a disk that is slow to answer: typing does not wait for it."""

    def __init__(self, prompt: Prompt, width: int):
        self.prompt, self.width = prompt, width

    def validate(self, document: Document) -> None:
        """Raises ValidationError with the reason, in lines of the terminal's width; `b` is taken, as the way back."""
        try:
            if document.text.strip() != "b":
                self.prompt.read(document.text)
        except UserError as error:
            reason = textwrap.fill(visible(f"{error.problem} {error.fix}"), self.width - 1, break_on_hyphens=False)
            raise ValidationError(len(document.text), reason) from None


def keys_of(prompt: Prompt) -> KeyBindings:
    """The keys that go back, and an Enter for paths and for lists."""
    bindings, known = KeyBindings(), [str(choice.value) for choice in prompt.choices]

    def back(event: KeyPressEvent) -> None:
        if not event.app.is_done:
            event.app.erase_when_done = True  # a question stepped back over leaves no half line
            event.app.exit(result=BACK)

    def pick(buffer: Buffer) -> bool:
        """End picking among completions; whether one was picked."""
        state, buffer.complete_state = buffer.complete_state, None
        return state is not None and state.current_completion is not None

    def accept(event: KeyPressEvent) -> None:
        """Enter takes what is typed, and a known path at once; from another folder that is picked one can go on."""
        buffer = event.current_buffer
        if (not pick(buffer) or buffer.text in known) and buffer.validate(set_cursor=True):
            event.app.exit(result=buffer.text)

    def separate(event: KeyPressEvent) -> None:
        """A separator is typed like any letter (questionary drops a second one, as in file://)."""
        buffer = event.current_buffer
        if not (pick(buffer) and buffer.text.endswith(os.sep)):  # a folder that was picked ends with one
            buffer.insert_text(os.sep)
        buffer.start_completion()

    def take(event: KeyPressEvent, number: int | None = None) -> None:
        """The line that is pointed at, or that of a number. The answer is its title alone: the note has been read."""
        lines = next(w.content for w in event.app.layout.find_all_windows() if isinstance(w.content, InquirerControl))
        if number is not None:
            lines.pointed_at = number
        line, lines.is_answered = lines.get_pointed_at(), True
        lines.search_filter, lines.pointed_at = None, lines.choices.index(line)
        line.title = next(choice.title for choice in prompt.choices if choice.value == line.value)
        event.app.exit(result=line.value)

    def more(event: KeyPressEvent) -> None:
        """A question mark asks for more, but where a text has been begun, of which it is a part."""
        suggested = "" if prompt.default in ("", None) else as_typed(prompt.default)
        if prompt.kind in ("choice", "several", "yes-no") or event.current_buffer.text in ("", suggested):
            event.app.erase_when_done = True
            event.app.exit(result=MORE)
        else:
            event.current_buffer.insert_text("?")

    if prompt.more and not is_searched(prompt):
        bindings.add("?", eager=True)(more)
    bindings.add(Keys.Escape, eager=True)(back)
    if prompt.kind == "path":
        bindings.add(Keys.ControlM, eager=True)(accept)
        bindings.add(os.sep, eager=True)(separate)
    if prompt.kind == "choice":
        bindings.add(Keys.ControlM, eager=True)(take)
        for number in range(0 if is_searched(prompt) else min(NUMBERED, len(prompt.choices))):
            bindings.add(str(number + 1), eager=True)(partial(take, number=number))
    if prompt.kind in ("yes-no", "several") or (prompt.kind == "choice" and not is_searched(prompt)):
        bindings.add("b", eager=True)(back)
    return bindings
