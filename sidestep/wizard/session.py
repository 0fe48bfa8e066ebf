"""A session of the wizard: the menu, a flow, its review; what ran before fills in what comes next."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Notice, Report, Table
from sidestep.files import files_below
from sidestep.settings import last_used
from sidestep.settings.config import (
    BuildDatasetConfig,
    CompareConfig,
    ModelConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    command_of,
)
from sidestep.settings.option import Choice, options_of
from sidestep.settings.path_checks import Check, likely_checkpoint_dirs, read_run
from sidestep.variants import download_command
from sidestep.wizard.flows import FLOWS, FOR_ALL_RUNS, Context, Flow, config_of, fitted, left_by, questions_of
from sidestep.wizard.questionnaire import BACK, Ask, Question, Questionnaire, ask_one, choose, from_option
from sidestep.wizard.review import START, Knowledge, manage_presets, review
from sidestep.words import side_step

# what `?` tells at the questions that stand between the flows
MENU_MORE = (
    "The first entries stand in the order of the work, and the pointer at the one that comes next. Each asks a few "
    "questions and shows a review; nothing runs before you say Start there."
)
NEXT_MORE = "What was just made is filled in already in the next step. The menu has everything else."
FIX_MORE = "The message above says what was wrong. All other answers are kept, and nothing that was saved is lost."
DEPTH_MORE = (
    "basic asks what differs from music to music; everything else can be changed in the review by typing a part of its "
    "name. advanced offers all of it, section by section."
)


@dataclass(frozen=True)
class Request:
    """What the user decided to run."""

    flow: str
    command: str
    config: Any


@dataclass(frozen=True)
class Outside:
    """What the wizard cannot know by itself: it may import neither torch nor audio libraries."""

    check: Check = lambda _holds, _path: ""
    machine: Callable[[Path | None], Table | None] = lambda _checkpoint_dir: None
    about: Knowledge = field(default_factory=Knowledge)
    open: Callable[[Path], str] = str  # shows or plays a file; what to say of it
    here: Path = field(default_factory=Path)


class Wizard:
    """Asks until there is something to run. `next()` returns it, `finished()` is told how it went."""

    def __init__(self, ask: Ask, show: Report, outside: Outside | None = None):
        self.ask, self.show, self.outside = ask, show, outside or Outside()
        self.last_used, problem = last_used.read()
        self._after: str = ""  # the flow that just went well
        self._left: str = ""  # the entry of the menu that was chosen last
        self._results: dict[str, Path] = {}  # what the flow that just went well made, to be opened
        self._going: tuple[Flow, Questionnaire, dict[str, Any]] | None = None  # what was started last, with its answers
        self._failed, self._how = False, ""
        if problem:
            self._print(problem, "warning")

    def next(self) -> Request | None:
        """The next thing to run, or None to leave. Ctrl-C at any question raises KeyboardInterrupt."""
        request = None if self.last_used.get("welcomed") else self._first_run()
        while request is None:
            follows_on = bool(self._after)
            key = self._choose_next()
            if key == "exit":
                return None
            if key == "presets":
                manage_presets(self.ask, self.show)
            elif key == "settings":
                depths = (
                    Choice("basic", "basic", "few questions; the rest has good defaults"),
                    Choice("advanced", "advanced", "every section is offered"),
                )
                last = self.last_used.get("depth")
                questions = [
                    choose("depth", "How much to ask?", depths, default=last, section="Settings", more=DEPTH_MORE)
                ]
                for o in (options_of(ModelConfig)[name] for name in FOR_ALL_RUNS):
                    last = self.last_used.get(o.name, o.default)
                    questions.append(from_option(o, lambda _answers, last=last: last, section="Settings"))
                answers = Questionnaire(questions, title="Settings", tell=self._print).forward(self.ask)
                if answers is not None:
                    self._keep(answers)
            elif key == "fix" and self._going:
                request = self._go(*self._going)
            elif key in FLOWS:
                request = self._run_flow(FLOWS[key], follows_on)
        return request

    def finished(self, request: Request, ok: bool, stopped: bool = False, left_out: bool = False) -> None:
        """Remember what was used; after a success the next step is offered, after a failure the answers once more.

        stopped: by the user, so that nothing is wrong with the answers. left_out: ok, but for some files.
        """
        self._how = "Done, but for the files named above" if left_out else "Done"
        self._failed = not ok and not stopped and FLOWS[request.flow].reviewed
        self._after = request.flow if ok and FLOWS[request.flow].then else ""
        self._results = results_of(request.config) if ok else {}
        if stopped and request.flow == "train":
            self._left = "resume"
        if ok:
            self._keep(left_by(request.config))
        elif stopped:
            self._keep({name: value for name, value in left_by(request.config).items() if name == "output_dir"})

    def _choose_next(self) -> str:
        """What to do, from the menu; after a flow that went well first from what makes sense then. Empty: ask again."""
        after, self._after = self._after, ""
        failed, self._failed = self._failed, False
        leave = (Choice("", "Back to the menu"), Choice("exit", "Exit"))
        if failed:
            fix = Choice("fix", "Change an answer", "the review of what was tried, with all answers kept")
            reply = ask_one(self.ask, choose("next", "What next?", (fix, *leave), more=FIX_MORE), "Not done")
        elif after:
            opened = {f"open {name}": path for name, path in self._results.items() if path.exists()}
            choices = (
                *(Choice(key, FLOWS[key].title, FLOWS[key].note) for key in FLOWS[after].then),
                *(Choice(key, key.capitalize(), str(path)) for key, path in opened.items()),
                *leave,
            )
            title = f"{self._how}: {FLOWS[after].title}"
            question = choose("next", "What next?", choices, more=NEXT_MORE)
            while (reply := ask_one(self.ask, question, title)) in opened:
                self._print(self.outside.open(opened[reply]))
        else:
            choices = (
                *(Choice(key, flow.title, flow.note) for key, flow in FLOWS.items()),
                Choice("presets", "Presets", "show, import, export, rename, delete"),
                Choice("settings", "Settings", "how much is asked; device and precision"),
                Choice("exit", "Exit"),
            )
            first = self._left or next_step(self.last_used)
            question = choose("menu", "What would you like to do?", choices, default=first, more=MENU_MORE)
            reply = ask_one(self.ask, question, "Side-Step")
        self._left = "" if reply is BACK else reply
        return self._left

    def _run_flow(self, flow: Flow, follows_on: bool) -> Request | None:
        context = Context(self.last_used, self.outside.check, self.outside.here)
        questions = questions_of(flow, context, self.last_used.get("depth") == "advanced")
        known = _handed_on(questions) if follows_on else {}
        return self._go(flow, Questionnaire(questions, known, flow.title, self._print), {})

    def _go(self, flow: Flow, questionnaire: Questionnaire, changes: dict[str, Any]) -> Request | None:
        """The questions that are left, then the review. `changes`: what was changed there before."""
        context = Context(self.last_used, self.outside.check, self.outside.here)
        while True:
            answers = questionnaire.forward(self.ask)
            if answers is None:
                return None
            flow = fitted(flow, answers)
            if not flow.reviewed:
                return Request(flow.key, command_of(flow.config_class), config_of(flow, answers, context))
            answers |= changes
            before = dict(answers)
            action, config = review(flow, answers, self.ask, self.show, context, self.outside.about)
            changes |= {name: value for name, value in answers.items() if before.get(name, BACK) != value}
            if action == START:
                self._going = (flow, questionnaire, changes)
                self._keep({"last_action": flow.key} | ({"preset": answers["preset"]} if "preset" in answers else {}))
                return Request(flow.key, command_of(flow.config_class), config)
            if action is not BACK or not questionnaire.back():
                return None

    def _first_run(self) -> Request | None:
        """Where are the checkpoints, what is this machine, and would a demo be welcome?"""
        self._print("Welcome to Side-Step. Two questions first; Enter takes what is suggested.")
        found = likely_checkpoint_dirs(self.outside.here)
        if not found:
            self._print("No ACE-Step 1.5 checkpoints were found nearby; the demo needs none.")
            self._print("This downloads them:")
            self._print(f"  {download_command()}")
        checkpoints = from_option(
            replace(options_of(ModelConfig)["checkpoint_dir"], optional=True),
            lambda _answers: str(found[0]) if found else "",
            self.outside.check,
            text="Where are the ACE-Step checkpoints?",
            help="the folder that holds acestep-v15-turbo/, vae/, …; empty: later",
            section="",
        )
        demo = Question(
            "try_demo",
            "Try the demo first?",
            "the whole pipeline on a tiny built-in model, in about a minute; needs no checkpoints",
            "yes-no",
            default=lambda answers: answers.get("checkpoint_dir") is None,
            more=(
                "It makes a tiny model and four short songs and takes them all the way, to see that all works here. "
                "The music is noise. Demo, in the menu, does it at any time."
            ),
        )
        answers = Questionnaire([checkpoints, demo], title="First run", tell=self._print).forward(self.ask) or {}
        if answers.get("checkpoint_dir"):
            self._keep({"checkpoint_dir": answers["checkpoint_dir"]})
        self._print("Looking at this machine (seconds, on a busy one a minute; Ctrl-C: skip) ...")
        machine = self.outside.machine(answers.get("checkpoint_dir"))
        self.show(machine or Notice(message=f"Not found out here; this tells it: {side_step('doctor')}"))
        self._keep({"welcomed": True})
        return self._run_flow(FLOWS["demo"], follows_on=False) if answers.get("try_demo") else None

    def _keep(self, values: dict[str, Any]) -> None:
        self.last_used.update(values)
        if problem := last_used.write(self.last_used):
            self._print(problem, "warning")

    def _print(self, line: str, level: str = "info") -> None:
        self.show(Notice(message=line, level=level))


def results_of(config: Any) -> dict[str, Path]:
    """What a config's job leaves to look at or listen to, by what it is; it need not be there."""
    match config:
        case TrainConfig(output_dir=folder):
            return {"the report": folder / "report.html", "the folder": folder}
        case SampleConfig(output=folder):
            newest = max(folder.glob("*.flac"), key=lambda path: path.stat().st_mtime, default=folder)
            return {"the music": newest, "the folder": folder}
        case ScoreConfig(run_folder=folder):
            return {"the listening page": folder / "score" / "listen.html", "the folder": folder / "score"}
        case CompareConfig(output=folder):
            return {"the listening page": folder / "listen.html", "the folder": folder}
        case BuildDatasetConfig(input=folder, output=output, audit=True):
            listed = output or folder / "dataset.json"
            return {"the page": listed.with_name(f"{listed.stem}-audit.html")}
    return {}


def next_step(used: Mapping[str, Any]) -> str:
    """The flow that comes next in the work, by what is still on disk of the folders and files last used."""

    def last(name: str) -> Path:
        return Path(used.get(name) or "nothing was used")

    run = read_run(last("adapter").parent)
    has_tensors = any(path.suffix == ".pt" for path in files_below(last("dataset_dir"), hidden=False))
    if (
        run
        and run.finished
        and (not has_tensors or last("dataset_dir").resolve() == Path(run.settings["dataset_dir"]).resolve())
    ):
        return "sample"
    if has_tensors:
        return "train"
    return "preprocess" if last("dataset_json").is_file() else next(iter(FLOWS))


def _handed_on(questions: list[Question]) -> dict[str, Any]:
    """Answers that a flow need not ask for again after the one before it: what that one left on disk.

    An answer that hangs on an earlier question which is still to be asked is asked, too.
    """
    known: dict[str, Any] = {}
    asked: set[str] = set()
    for question in questions:
        suggestion = question.default(known)
        skips = question.on_disk and question.when(known) and not asked & set(question.depends_on)
        if skips and suggestion not in ("", None):
            try:
                value = question.asked(known, suggestion).read(suggestion)
                question.verify(value, known)
                known[question.name] = value
                continue
            except UserError:
                pass  # not there any more, or not what it was: ask
        asked.add(question.name)
    return known
