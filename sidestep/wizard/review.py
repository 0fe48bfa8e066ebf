"""What is shown before anything runs: every setting, the command that does the same, and what to change or keep."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.files import expand
from sidestep.settings import presets
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import Answers, Choice, changed_from_defaults, options_of
from sidestep.settings.path_checks import path_of
from sidestep.terminal.terminal import as_typed
from sidestep.wizard.flows import Context, Flow, config_of, question_of, sections_of
from sidestep.wizard.questionnaire import BACK, Ask, Move, Question, Questionnaire, ask_one, choose, needed

About = Callable[[Any], list[str]]  # lines on a config that only the outside knows: its data, memory and time
START, EDIT, ALL, SAVE, CANCEL = "start", "edit", "all", "save", "cancel"


def review_table(title: str, config: Any) -> Table:
    """Every setting by section; a star marks what differs from the default."""
    changed, options = changed_from_defaults(config), options_of(type(config))
    rows = []
    for section, names in sections_of(type(config)).items():
        rows.append(("", section.upper(), "", ""))
        for name in names:
            default = "" if options[name].required or name not in changed else as_typed(options[name].default)
            rows.append(
                ("*" if name in changed else "", name.replace("_", " "), as_typed(getattr(config, name)), default)
            )
    return Table(title=title, columns=("", "setting", "value", "default"), rows=tuple(rows))


def review(
    flow: Flow, answers: dict[str, Any], ask: Ask, show: Report, context: Context, about: About
) -> tuple[str | Move, Any]:
    """Show and let the user start, change or leave: (START, config), (CANCEL, None) or (BACK, None).

    `answers` takes the changes.
    """
    while True:
        config = None
        try:
            config = config_of(flow, answers, context)
        except UserError as error:
            show(Notice(message=f"{error.problem} {error.fix}".strip(), level="error"))
        else:
            show(review_table(f"Review: {flow.title}  (* differs from the default)", config))
            if type(config) is TrainConfig:
                show(Notice(message="Working out the memory of this run (Ctrl-C: skip) ..."))
            for line in about(config):
                show(Notice(message=line))
            show(Notice(message="The same as a command:"))
            show(Notice(message=f"  {command_line(config)}"))
        start = [Choice(START, "Start", "run it now")] if config else []
        change = [
            Choice(EDIT, "Change a section", "and come back here"),
            Choice(ALL, "Go through all settings", "the advanced ones too"),
        ]
        save = (
            [Choice(SAVE, "Save as preset", "to use these settings again")] if config and "preset" in flow.basic else []
        )
        actions = (*start, *change, *save, Choice(CANCEL, "Cancel", "back to the menu"))
        action = ask_one(ask, choose("review", "What now?", actions, section="Review"), flow.title)
        if action is BACK or action == CANCEL:
            return action, None
        if action == START:
            return START, config
        if action == SAVE:
            _save(ask, show, config, flow.title)
        else:
            _edit(flow, answers, config, ask, show, context, every=action == ALL)


def _edit(
    flow: Flow, answers: dict[str, Any], config: Any, ask: Ask, show: Report, context: Context, every: bool
) -> None:
    sections = sections_of(flow.config_class)
    names = [name for section in sections.values() for name in section]
    if not every:
        choices = tuple(
            Choice(section, section, ", ".join(n.replace("_", " ") for n in held[:4]))
            for section, held in sections.items()
        )
        section = ask_one(ask, choose("section", "Which section?", choices, section="Review"), flow.title)
        if section is BACK:
            return
        names = sections[section]
    current = answers | ({name: getattr(config, name) for name in options_of(flow.config_class)} if config else {})
    unasked = {name: value for name, value in current.items() if name not in names}
    questions = [question_of(name, flow, context, current) for name in names]
    changed = Questionnaire(questions, unasked, flow.title, lambda line: show(Notice(message=line))).forward(ask)
    if changed is not None:
        answers.update({name: changed[name] for name in names if name in changed})


def _save(ask: Ask, show: Report, config: Any, title: str) -> None:
    question = Question(
        "preset_name",
        "Name of the preset",
        "letters, digits, spaces, - and _; folders and files are not kept in it",
        "text",
        "Review",
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

    return [
        choose("action", "What would you like to do?", actions),
        Question(
            "name",
            "Which preset?",
            kind="choice",
            default=lambda answers: presets_for(answers)[0].value,
            choices=presets_for,
            when=lambda answers: answers.get("action") in ("show", "export", "rename", "delete"),
        ),
        words("file", "Which file?", "a preset as .json; nothing in it is ever executed", "path", "import"),
        words("target", "Where to?", "a new .json file, or a folder", "path", "export", "."),
        words("new_name", "New name", "letters, digits, spaces, - and _", "text", "rename"),
        Question("sure", "Delete it?", kind="yes-no", default=lambda _: False, when=lambda a: to(a, "delete")),
    ]
