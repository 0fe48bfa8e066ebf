"""The review before anything runs: every setting, what differs from the defaults, and the command that does the same.

Presets managed from the wizard: look at them, rename, delete, bring in, hand out.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.settings import presets
from sidestep.settings.config import TrainConfig, command_line
from sidestep.settings.option import changed_from_defaults, options_of
from sidestep.terminal.lines import as_typed
from sidestep.wizard.flows import Flow, Surroundings, config_of, questions_for, sections_of
from sidestep.wizard.questionnaire import BACK, Ask, Choice, Question, Walk

Facts = Callable[[Any], list[str]]
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
    flow: Flow, answers: dict[str, Any], ask: Ask, show: Report, around: Surroundings, facts: Facts
) -> tuple[str, Any]:
    """Show and let the user start, change or leave: (START, config), (CANCEL, None) or (BACK, None).

    `answers` takes the changes. `facts`: lines about a config that only the outside knows: its data, memory and time.
    """
    while True:
        config = None
        try:
            config = config_of(flow, answers, around)
        except UserError as error:
            show(Notice(message=f"{error.problem} {error.fix}".strip(), level="error"))
        else:
            show(review_table(f"Review: {flow.title}  (* differs from the default)", config))
            if type(config) is TrainConfig:
                show(Notice(message="Working out the memory of this run (Ctrl-C: skip) ..."))
            for line in facts(config):
                show(Notice(message=line))
            show(Notice(message=f"The same as a command:\n  {command_line(config)}"))
        action = ask_one(ask, _actions(flow, config is not None), flow.title)
        if action is BACK or action == CANCEL:
            return action, None
        if action == START:
            return START, config
        if action == SAVE:
            _save(ask, show, config, flow.title)
        else:
            _edit(flow, answers, config, ask, show, around, every=action == ALL)


def _actions(flow: Flow, ready: bool) -> Question:
    choices = [Choice(START, "Start", "run it now")] if ready else []
    choices += [
        Choice(EDIT, "Change a section", "and come back here"),
        Choice(ALL, "Go through all settings", "the advanced ones too"),
    ]
    if ready and flow.with_preset:
        choices.append(Choice(SAVE, "Save as preset", "to use these settings again"))
    choices.append(Choice(CANCEL, "Cancel", "back to the menu"))
    return Question(
        "review", "What now?", "", "choice", "Review", lambda answers: choices[0].value, lambda answers: tuple(choices)
    )


def _edit(
    flow: Flow, answers: dict[str, Any], config: Any, ask: Ask, show: Report, around: Surroundings, every: bool
) -> None:
    sections = sections_of(flow.config_class)
    if every:
        names = [name for section in sections.values() for name in section]
    else:
        choices = tuple(
            Choice(section, section, ", ".join(n.replace("_", " ") for n in names[:4]))
            for section, names in sections.items()
        )
        section = ask_one(
            ask,
            Question(
                "section", "Which section?", "", "choice", "Review", lambda a: choices[0].value, lambda a: choices
            ),
            flow.title,
        )
        if section is BACK:
            return
        names = sections[section]
    current = answers | (
        {name: getattr(config, name) for name in options_of(flow.config_class)} if config is not None else {}
    )
    unasked = {name: value for name, value in current.items() if name not in names}
    walk = Walk(
        questions_for(flow, around, names, current), unasked, flow.title, lambda line: show(Notice(message=line))
    )
    changed = walk.forward(ask)
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


def ask_one(ask: Ask, question: Question, title: str = "") -> Any:
    """The answer to a question that stands alone, or BACK."""
    answers = Walk([question], title=title).forward(ask)
    return BACK if answers is None else answers[question.name]


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
        answers = Walk(_questions(), title=TITLE).forward(ask)
        if answers is None or answers["action"] == "back":
            return
        try:
            _do(answers, show)
        except UserError as error:
            show(Notice(message=f"{error.problem} {error.fix}".strip(), level="error"))


def _questions() -> list[Question]:
    actions = (
        Choice("show", "Show a preset"),
        Choice("import", "Import a preset", "from a .json file"),
        Choice("export", "Export a preset", "to a .json file"),
        Choice("rename", "Rename a preset", "one of yours"),
        Choice("delete", "Delete a preset", "one of yours"),
        Choice("back", "Back to the menu"),
    )

    def which(answers: Any) -> tuple[Choice, ...]:
        own = answers.get("action") in ("rename", "delete")
        found = tuple(
            Choice(p.name, p.name, p.description or ("built in" if p.built_in else "yours"))
            for p in presets.list_presets()
            if not (own and p.built_in)
        )
        return found or (Choice("", "none of yours yet"),)

    def words(name: str, text: str, help: str, kind: str, action: tuple[str, ...], default: Any = "") -> Question:
        return Question(
            name,
            text,
            help,
            kind,
            default=lambda a: default,
            read=_needed,
            when=lambda a: a.get("action") in action and a.get("name") != "",
        )

    return [
        Question(
            "action", "What would you like to do?", "", "choice", default=lambda a: "show", choices=lambda a: actions
        ),
        Question(
            "name",
            "Which preset?",
            "",
            "choice",
            default=lambda a: which(a)[0].value,
            choices=which,
            when=lambda a: a.get("action") in ("show", "export", "rename", "delete"),
        ),
        words("file", "Which file?", "a preset as .json; nothing in it is ever executed", "path", ("import",)),
        words("target", "Where to?", "a new .json file, or a folder", "path", ("export",), "."),
        words("new_name", "New name", "letters, digits, spaces, - and _", "text", ("rename",)),
        Question(
            "sure",
            "Delete it?",
            "",
            "yes-no",
            default=lambda a: False,
            when=lambda a: a.get("action") == "delete" and a.get("name") != "",
        ),
    ]


def _needed(reply: Any, _answers: Any) -> str:
    text = str(reply).strip().strip("\"'")
    if not text:
        raise UserError("This one needs an answer.")
    return text


def _do(answers: dict[str, Any], show: Report) -> None:
    name = answers.get("name")
    match answers["action"]:
        case _ if name == "":
            show(Notice(message="There is none of yours yet: save one in a review, or import one."))
        case "show":
            show(preset_table(presets.find(name)))
        case "import":
            source = presets.read(Path(answers["file"]).expanduser())
            preset = presets.import_file(Path(answers["file"]))
            ignored = (
                f" Ignored, because no command has such a setting: {', '.join(source.unknown)}."
                if source.unknown
                else ""
            )
            show(Notice(message=f"Imported as {preset.name}.{ignored}"))
        case "export":
            show(Notice(message=f"Written to {presets.export_file(name, Path(answers['target']))}."))
        case "rename":
            show(Notice(message=f"{name} is now {presets.rename(name, answers['new_name']).name}."))
        case "delete" if answers["sure"]:
            presets.delete(name)
            show(Notice(message=f"{name} is deleted."))
