"""Presets managed from the wizard: look at them, rename, delete, bring in, hand out."""

from pathlib import Path
from typing import Any

from sidestep import presets
from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.terminal.render import as_typed
from sidestep.wizard.questions import Ask, Choice, Question
from sidestep.wizard.walk import Walk

TITLE = "Manage presets"


def preset_table(preset: presets.Preset) -> Table:
    """A preset's settings beside the defaults, and the keys of its file that are ignored."""
    options = presets.preset_options()
    rows = [(options[name].flag, as_typed(value), as_typed(options[name].default)) for name, value in preset.values.items()]
    rows += [(name, "ignored: no such setting", "") for name in preset.unknown]
    return Table(title=f"{preset.name}: {preset.description}".rstrip(": "), columns=("setting", "value", "default"), rows=tuple(rows))


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
            Choice(p.name, p.name, p.description or ("built in" if p.built_in else "yours")) for p in presets.list_presets() if not (own and p.built_in)
        )
        return found or (Choice("", "none of yours yet"),)

    def words(name: str, text: str, help: str, kind: str, action: tuple[str, ...], default: Any = "") -> Question:
        return Question(name, text, help, kind, default=lambda a: default, read=_needed, when=lambda a: a.get("action") in action and a.get("name") != "")

    return [
        Question("action", "What would you like to do?", "", "choice", default=lambda a: "show", choices=lambda a: actions),
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
        Question("sure", "Delete it?", "", "yes-no", default=lambda a: False, when=lambda a: a.get("action") == "delete" and a.get("name") != ""),
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
            ignored = f" Ignored, because no command has such a setting: {', '.join(source.unknown)}." if source.unknown else ""
            show(Notice(message=f"Imported as {preset.name}.{ignored}"))
        case "export":
            show(Notice(message=f"Written to {presets.export_file(name, Path(answers['target']))}."))
        case "rename":
            show(Notice(message=f"{name} is now {presets.rename(name, answers['new_name']).name}."))
        case "delete" if answers["sure"]:
            presets.delete(name)
            show(Notice(message=f"{name} is deleted."))
