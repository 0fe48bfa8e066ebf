"""The review before anything runs: every setting, what differs from the defaults, and the command that does the same."""

from collections.abc import Callable
from typing import Any

from sidestep import presets
from sidestep.config import TrainConfig, command_line
from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.options import changed_from_defaults, options_of
from sidestep.terminal.render import as_typed
from sidestep.wizard.flows import Flow, Surroundings, config_of, questions_for, sections_of
from sidestep.wizard.questions import BACK, Ask, Choice, Question
from sidestep.wizard.walk import Walk

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
            rows.append(("*" if name in changed else "", name.replace("_", " "), as_typed(getattr(config, name)), default))
    return Table(title=title, columns=("", "setting", "value", "default"), rows=tuple(rows))


def review(flow: Flow, answers: dict[str, Any], ask: Ask, show: Report, around: Surroundings, facts: Facts) -> tuple[str, Any]:
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
    choices += [Choice(EDIT, "Change a section", "and come back here"), Choice(ALL, "Go through all settings", "the advanced ones too")]
    if ready and flow.with_preset:
        choices.append(Choice(SAVE, "Save as preset", "to use these settings again"))
    choices.append(Choice(CANCEL, "Cancel", "back to the menu"))
    return Question("review", "What now?", "", "choice", "Review", lambda answers: choices[0].value, lambda answers: tuple(choices))


def _edit(flow: Flow, answers: dict[str, Any], config: Any, ask: Ask, show: Report, around: Surroundings, every: bool) -> None:
    sections = sections_of(flow.config_class)
    if every:
        names = [name for section in sections.values() for name in section]
    else:
        choices = tuple(Choice(section, section, ", ".join(n.replace("_", " ") for n in names[:4])) for section, names in sections.items())
        section = ask_one(ask, Question("section", "Which section?", "", "choice", "Review", lambda a: choices[0].value, lambda a: choices), flow.title)
        if section is BACK:
            return
        names = sections[section]
    current = answers | ({name: getattr(config, name) for name in options_of(flow.config_class)} if config is not None else {})
    unasked = {name: value for name, value in current.items() if name not in names}
    walk = Walk(questions_for(flow, around, names, current), unasked, flow.title, lambda line: show(Notice(message=line)))
    changed = walk.forward(ask)
    if changed is not None:
        answers.update({name: changed[name] for name in names if name in changed})


def _save(ask: Ask, show: Report, config: Any, title: str) -> None:
    question = Question("preset_name", "Name of the preset", "letters, digits, spaces, - and _; folders and files are not kept in it", "text", "Review")
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
