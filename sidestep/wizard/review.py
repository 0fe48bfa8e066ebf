"""What is shown before anything runs: the settings that matter, the same as a command, and what to change or keep."""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.files import expand
from sidestep.settings import presets
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import Answers, Choice, changed_from_defaults, options_of
from sidestep.settings.path_checks import path_of
from sidestep.terminal.terminal import as_typed
from sidestep.wizard.flows import LEFT_TO_PRESET, Context, Flow, config_of, question_of, sections_of
from sidestep.wizard.questionnaire import BACK, NEWS, Ask, Move, Question, Questionnaire, ask_one, choose, needed

About = Callable[[Any], list[str]]  # lines on a config that only the outside knows
REVIEW_MORE = (
    "Settings with a star differ from the default, which stands beside them. Nothing has run or been written yet. The "
    "command does the same in a script or on another machine."
)
START, CHANGE, ALL, SAVE, CANCEL = "start", "change", "all", "save", "cancel"


@dataclass(frozen=True)
class Knowledge:
    """What only the outside knows of a config. `slow`: what takes so long that it comes while the review is shown."""

    quick: About = lambda _config: []
    slow: About = lambda _config: []


def review_table(title: str, config: Any, asked: Container[str], every: bool = False) -> Table:
    """The settings that were asked for or differ from the default, with a star where they do; or every setting."""
    changed, options = changed_from_defaults(config), options_of(type(config))
    rows = []
    for section, names in sections_of(type(config)).items():
        if every:
            rows.append(("", section.upper(), "", ""))
        for name in names:
            o, is_changed = options[name], name in changed and not options[name].required
            if every or name in changed or name in asked:
                default = as_typed(o.default) if is_changed else ""
                rows.append(("*" if is_changed else "", o.title, as_typed(getattr(config, name)), default))
    return Table(title=title, columns=("", "setting", "value", "default"), rows=tuple(rows))


def review(
    flow: Flow, answers: dict[str, Any], ask: Ask, show: Report, context: Context, knowledge: Knowledge
) -> tuple[str | Move, Any]:
    """Show and let the user start, change or leave: (START, config), (CANCEL, None) or (BACK, None).

    `answers` takes the changes.
    """
    every, shown_of, news, rest = False, None, None, 0
    lines: list[str] = []
    while True:
        config = None
        try:
            config = config_of(flow, answers, context)
        except UserError as error:
            show(Notice(message=f"{error.problem} {error.fix}".strip(), level="error"))
        if config and (config, every) != shown_of:
            table = review_table(
                f"{flow.title}: ready to start  (* not the default)",
                config,
                {*answers, *LEFT_TO_PRESET, *flow.shown},
                every,
            )
            show(Notice(message=""))
            show(table)
            rest = 0 if every else len(options_of(flow.config_class)) - len(table.rows)
            for line in knowledge.quick(config):
                show(Notice(message=line))
            show(Notice(message="The same as a command:"))
            show(Notice(message=f"  {command_line(config)}"))
            if shown_of is None or config != shown_of[0]:
                lines, news = in_background(partial(knowledge.slow, config))
                if type(config) is TrainConfig:
                    show(Notice(message="Time, memory and disk are being worked out; they appear here."))
            shown_of = (config, every)
        offered = (
            *([Choice(START, "Start", "run it now")] if config else []),
            Choice(CHANGE, "Change a setting", "type a part of its name"),
            *([Choice(ALL, "Show all settings", f"and {rest} more at their defaults")] if config and rest > 0 else []),
            *([Choice(SAVE, "Save as preset", "to use these again")] if config and "preset" in flow.basic else []),
            Choice(CANCEL, "Cancel", "back to the menu"),
        )
        question = choose("review", "What now?", offered, section="Review", more=REVIEW_MORE)
        action = ask_one(ask, question, flow.title, news)
        if action is NEWS:
            for line in lines:
                show(Notice(message=line))
            news = None
        elif action is BACK or action == CANCEL:
            return action, None
        elif action == START:
            return START, config
        elif action == SAVE:
            _save(ask, show, config, flow.title)
        elif action == ALL:
            every = True
        else:
            _change(flow, answers, config, ask, show, context)


def in_background(work: Callable[[], list[str]]) -> tuple[list[str], Event]:
    """What lines work returns are put into the list, and the event is set, whenever that is."""
    lines: list[str] = []
    done = Event()

    def run() -> None:
        try:
            lines.extend(work())
        finally:
            done.set()

    Thread(target=run, daemon=True).start()
    return lines, done


def _change(flow: Flow, answers: dict[str, Any], config: Any, ask: Ask, show: Report, context: Context) -> None:
    """Ask which setting, then for its value."""
    options = options_of(flow.config_class)
    current = answers | ({name: getattr(config, name) for name in options} if config else {})
    settings = tuple(
        Choice(name, o.title, as_typed(current[name]) if name in current else "")
        for name, o in options.items()
        if not (o.many and o.type is Path)  # asked one by one before: names may hold spaces
    )
    name = ask_one(ask, choose("setting", "Which setting?", settings, section="Review"), flow.title)
    if name is BACK:
        return
    unasked = {other: value for other, value in current.items() if other != name}
    question = replace(question_of(name, flow, context, current), when=lambda _answers: True)
    changed = Questionnaire([question], unasked, flow.title, lambda line: show(Notice(message=line))).forward(ask)
    if changed is not None:
        answers[name] = changed[name]


def _save(ask: Ask, show: Report, config: Any, title: str) -> None:
    question = Question(
        "preset_name",
        "Name of the preset",
        "letters, digits, spaces, - and _; folders and files are not kept in it",
        "text",
        "Review",
        more="It then stands in the list of presets, here and for --preset. Presets, in the menu, exports it.",
    )
    name = ask_one(ask, question, title)
    if name is BACK:
        return
    try:
        preset = presets.save(str(name).strip(), presets.settings_of(config))
    except UserError as error:
        show(Notice(message=f"{error.problem} {error.fix}", level="error"))
        return
    show(Notice(message=f"Saved as preset {preset.name}: {preset.path}"))


TITLE = "Manage presets"
PRESETS_MORE = (
    "A preset is a file of settings, without folders, to use again or to give to others. Those that are built in stay "
    "as they are; yours can be renamed and deleted."
)
GONE = "its file is gone then; runs that were made with it keep their settings"


def preset_table(preset: presets.Preset) -> Table:
    """A preset's settings beside the defaults, and the keys of its file that are ignored."""
    options = presets.preset_options()
    rows = [
        (options[name].flag, as_typed(value), as_typed(options[name].default)) for name, value in preset.values.items()
    ]
    rows += [(name, "ignored: no such setting", "") for name in preset.unknown]
    return Table(
        title=f"{preset.name}: {preset.description}".rstrip(": "),
        columns=("setting", "value", "default"),
        rows=tuple(rows),
    )


def manage_presets(ask: Ask, show: Report) -> None:
    """Ask what to do with which preset until the user goes back."""
    while True:
        answers = Questionnaire(_preset_questions(), title=TITLE).forward(ask)
        if answers is None or answers["action"] == "back":
            return
        action, name, done = answers["action"], answers.get("name", ""), ""
        try:
            if "name" in answers and not name:
                done = "There is none of yours yet: save one in a review, or import one."
            elif action == "show":
                show(preset_table(presets.find(name)))
            elif action == "import":
                done = f"Imported as {presets.import_file(Path(answers['file'])).name}."
                if unknown := ", ".join(presets.read(expand(answers["file"])).unknown):
                    done += f" Ignored, because no command has such a setting: {unknown}."
            elif action == "export":
                done = f"Written to {presets.export_file(name, Path(answers['target']))}."
            elif action == "rename":
                done = f"{name} is now {presets.rename(name, answers['new_name']).name}."
            elif answers["sure"]:
                presets.delete(name)
                done = f"{name} is deleted."
            else:
                done = "Nothing was deleted."
            if done:
                show(Notice(message=done))
        except UserError as error:
            show(Notice(message=f"{error.problem} {error.fix}".strip(), level="error"))


def _preset_questions() -> list[Question]:
    actions = (
        Choice("show", "Show a preset"),
        Choice("import", "Import a preset", "from a .json file"),
        Choice("export", "Export a preset", "to a .json file"),
        Choice("rename", "Rename a preset", "one of yours"),
        Choice("delete", "Delete a preset", "one of yours"),
        Choice("back", "Back to the menu"),
    )

    def presets_for(answers: Answers) -> tuple[Choice, ...]:
        own = answers.get("action") in ("rename", "delete")
        found = tuple(
            Choice(p.name, p.name, p.description or ("built in" if p.built_in else "yours"))
            for p in presets.list_presets()
            if not (own and p.built_in)
        )
        return found or (Choice("", "none of yours yet"),)

    def words(name: str, text: str, help: str, kind: str, action: str, default: str = "") -> Question:
        read = needed if kind == "text" else lambda reply, answers: path_of(needed(reply, answers))
        return Question(name, text, help, kind, default=lambda _: default, read=read, when=lambda a: to(a, action))

    def to(answers: Answers, *wanted: str) -> bool:
        return answers.get("action") in wanted and answers.get("name") != ""

    questions = [
        choose("action", "What would you like to do?", actions),
        Question(
            "name",
            "Which preset?",
            "yours, and those that are built in",
            kind="choice",
            default=lambda answers: presets_for(answers)[0].value,
            choices=presets_for,
            when=lambda answers: answers.get("action") in ("show", "export", "rename", "delete"),
        ),
        words("file", "Which file?", "a preset as .json; nothing in it is ever executed", "path", "import"),
        words("target", "Where to?", "a new .json file, or a folder", "path", "export", "."),
        words("new_name", "New name", "letters, digits, spaces, - and _", "text", "rename"),
        Question("sure", "Delete it?", GONE, "yes-no", default=lambda _: False, when=lambda a: to(a, "delete")),
    ]
    return [replace(question, more=PRESETS_MORE) for question in questions]
