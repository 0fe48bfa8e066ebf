"""A session of the wizard: the menu, a flow, its review; what ran before fills in what comes next."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.settings import last_used as carry_over
from sidestep.settings import path_checks as places
from sidestep.settings.config import ModelConfig, command_of
from sidestep.settings.option import options_of
from sidestep.settings.path_checks import likely_checkpoint_dirs
from sidestep.wizard.flows import FLOW_ORDER, FLOWS, Flow, Surroundings, carried_from, for_later, questions_of
from sidestep.wizard.questionnaire import BACK, Ask, Choice, Question, Walk, from_option
from sidestep.wizard.review import START, Facts, ask_one, manage_presets, review

NEXT = {  # what makes sense after a flow that went well
    "build-dataset": ("preprocess",),
    "preprocess": ("estimate", "train-lora", "train-lokr"),
    "estimate": ("train-lora", "train-lokr"),
    "train-lora": ("sample", "export"),
    "train-lokr": ("sample", "export"),
    "resume": ("sample", "export"),
    "sample": ("export", "sample"),
}
SUGGESTED = {"preprocess": "train-lora"}  # where the first of NEXT is not what most people want
# From one flow to the next these are filled in and not asked again; the review can still change them.
HANDED_ON = ("checkpoint_dir", "model_variant", "dataset_dir", "adapter", "output_dir", "tensor_output", "songs")


@dataclass(frozen=True)
class Chosen:
    """What the user decided to run."""

    flow: str
    command: str
    config: Any


def _nothing(_config: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Outside:
    """What the wizard cannot know by itself: it may import neither torch nor audio libraries."""

    songs: Callable[[Path], str] = lambda folder: "songs"  # "12 songs, 47 min"; raises UserError where there are none
    machine: Callable[[Path | None], Table | None] = lambda checkpoint_dir: None
    facts: Facts = _nothing
    here: Path = field(default_factory=Path)


class Wizard:
    """Asks until there is something to run. `next()` returns it, `finished()` is told how it went."""

    def __init__(self, ask: Ask, show: Report, outside: Outside | None = None):
        self.ask, self.show, self.outside = ask, show, outside or Outside()
        kept = carry_over.read()
        self.carried: dict[str, Any] = kept.values
        self._after: str = ""  # the flow that just went well
        if kept.notice:
            self._say(kept.notice, "warning")

    def next(self) -> Chosen | None:
        """The next thing to run, or None to leave. Ctrl-C at any question raises KeyboardInterrupt."""
        if not self.carried.get("welcomed"):
            chosen = self._first_run()
            if chosen is not None:
                return chosen
        while True:
            handed_on = bool(self._after)
            key = self._what_next() if self._after else self._menu()
            self._after = ""
            if key == "exit":
                return None
            if key == "presets":
                manage_presets(self.ask, self.show)
            elif key == "settings":
                self._settings()
            elif key in FLOWS:
                chosen = self._run_flow(FLOWS[key], handed_on)
                if chosen is not None:
                    return chosen

    def finished(self, chosen: Chosen, ok: bool) -> None:
        """Remember what was used; after a success the next step is offered with everything filled in."""
        self._after = chosen.flow if ok and chosen.flow in NEXT else ""
        if ok:
            self._keep(carried_from(chosen.config))

    def _menu(self) -> str:
        choices = [Choice(key, FLOWS[key].title) for key in FLOW_ORDER if key in FLOWS]
        choices += [
            Choice("presets", "Manage presets"),
            Choice("settings", "Settings"),
            Choice("demo", FLOWS["demo"].title),
            Choice("exit", "Exit"),
        ]
        first = self.carried.get("last_action")
        default = first if first in [choice.value for choice in choices] else "preprocess"
        question = Question(
            "menu",
            "What would you like to do?",
            "",
            "choice",
            "",
            lambda answers: default,
            lambda answers: tuple(choices),
        )
        reply = ask_one(self.ask, question, "Side-Step")
        return "" if reply is BACK else reply

    def _what_next(self) -> str:
        keys = [key for key in NEXT[self._after] if key in FLOWS]
        choices = [Choice(key, FLOWS[key].title, "everything filled in") for key in keys] + [
            Choice("", "Back to the menu"),
            Choice("exit", "Exit"),
        ]
        first = SUGGESTED.get(self._after, choices[0].value)
        question = Question(
            "next", "What next?", "", "choice", "", lambda answers: first, lambda answers: tuple(choices)
        )
        reply = ask_one(self.ask, question, f"Done: {FLOWS[self._after].title}")
        return "" if reply is BACK else reply

    def _run_flow(self, flow: Flow, handed_on: bool) -> Chosen | None:
        around = Surroundings(self.carried, self.outside.songs, self.outside.here)
        questions = questions_of(flow, around, self.carried.get("depth") == "advanced")
        known = _known(questions) if handed_on else {}
        walk = Walk(questions, known, flow.title, self._say)
        changes: dict[str, Any] = {}
        while True:
            answers = walk.forward(self.ask)
            if answers is None:
                return None
            answers |= changes
            before = dict(answers)
            action, config = review(flow, answers, self.ask, self.show, around, self.outside.facts)
            changes = {
                name: value for name, value in answers.items() if name not in before or before[name] != value
            } | changes
            if action == START:
                self._keep({"last_action": flow.key} | ({"preset": answers["preset"]} if "preset" in answers else {}))
                return Chosen(flow.key, command_of(flow.config_class), config)
            if action is not BACK or not walk.back():
                return None

    def _first_run(self) -> Chosen | None:
        """Where are the checkpoints, what is this machine, and would a demo be welcome?"""
        self._say("Welcome to Side-Step. Two questions first; Enter takes what is suggested.")
        found = likely_checkpoint_dirs(self.outside.here)
        if not found:
            self._say(
                f"No ACE-Step 1.5 checkpoints were found nearby. They can be downloaded with:\n  {places.DOWNLOAD}\nThe demo needs none."
            )
        option = options_of(ModelConfig)["checkpoint_dir"]

        def read(reply: Any, _answers: Any) -> Path | None:
            if not str(reply).strip():
                return None
            path = option.check(str(reply).strip().strip("\"'"))
            places.checkpoints(path)
            return path

        checkpoints = from_option(
            option,
            lambda answers: str(found[0]) if found else "",
            text="Where are the ACE-Step checkpoints?",
            help="the folder that holds acestep-v15-turbo/, vae/, …; empty: later",
            read=read,
            tell=lambda path, answers: places.checkpoints(path) if path else "",
            section="",
        )
        demo = Question(
            "try_demo",
            "Try the demo first?",
            "the whole pipeline on a tiny built-in model, in about a minute; needs no checkpoints",
            "yes-no",
            default=lambda answers: answers.get("checkpoint_dir") is None,
        )
        answers = Walk([checkpoints, demo], title="First run", say=self._say).forward(self.ask)
        if answers is None:
            answers = {}
        if answers.get("checkpoint_dir"):
            self._keep({"checkpoint_dir": answers["checkpoint_dir"].as_posix()})
        self._say("Looking at this machine (a few seconds; Ctrl-C: skip) ...")
        machine = self.outside.machine(answers.get("checkpoint_dir"))
        if machine is not None:
            self.show(machine)
        self._keep({"welcomed": True})
        if answers.get("try_demo"):
            return self._run_flow(FLOWS["demo"], handed_on=False)
        return None

    def _settings(self) -> None:
        device, precision = (options_of(ModelConfig)[name] for name in ("device", "precision"))
        depths = (
            Choice("basic", "basic", "few questions; the rest has good defaults"),
            Choice("advanced", "advanced", "every section is offered"),
        )
        questions = [
            Question(
                "depth",
                "How much to ask?",
                "",
                "choice",
                "Settings",
                lambda answers: self.carried.get("depth", "basic"),
                lambda answers: depths,
            ),
            from_option(device, lambda answers: self.carried.get("device", device.default), section="Settings"),
            from_option(
                precision, lambda answers: self.carried.get("precision", precision.default), section="Settings"
            ),
        ]
        answers = Walk(questions, title="Settings", say=self._say).forward(self.ask)
        if answers is not None:
            self._keep(answers)

    def _keep(self, values: dict[str, Any]) -> None:
        self.carried.update(values)
        if problem := carry_over.write(for_later(self.carried)):
            self._say(problem, "warning")

    def _say(self, line: str, level: str = "info") -> None:
        self.show(Notice(message=line, level=level))


def _known(questions: list[Question]) -> dict[str, Any]:
    """Answers that a chain need not ask for again: those whose suggestion is taken as it stands, in order."""
    known: dict[str, Any] = {}
    for question in questions:
        if question.name in HANDED_ON and question.when(known):
            suggestion = question.default(known)
            if suggestion in ("", None):
                continue
            try:
                known[question.name] = question.asked(known, suggestion).read(suggestion)
            except UserError:
                continue  # not there any more, or not what it was: ask
    return known
