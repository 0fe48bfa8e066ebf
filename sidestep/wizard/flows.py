"""The wizard's flows: which settings each one asks for, with which suggestions, and the config that comes out."""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sidestep.errors import UserError
from sidestep.settings import presets
from sidestep.settings.advice import SUGGESTED, Advice, advice_for
from sidestep.settings.config import (
    BuildDatasetConfig,
    CompareConfig,
    DemoConfig,
    DoctorConfig,
    EstimateConfig,
    ExportConfig,
    HistoryConfig,
    PlanConfig,
    PreprocessConfig,
    SampleConfig,
    ScoreConfig,
    TrainConfig,
    TrainLmConfig,
)
from sidestep.settings.option import Answers, Choice, Option, matters, options_of, resolve
from sidestep.settings.path_checks import (
    Check,
    FoundRun,
    a_prompt_of,
    find_runs,
    glance,
    has_language_model,
    is_in_doubt,
    likely_checkpoint_dirs,
    read_run,
    run_of,
    songs_near,
    tensors_near,
)
from sidestep.wizard.questionnaire import Question, choose, from_option


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A way from the menu to a config. `basic`: what is asked without going into detail; the rest is in the review."""

    key: str
    title: str
    note: str  # what it is for, in the menu
    config_class: type
    basic: tuple[str, ...]  # names of settings, or songs, run and preset
    covered: tuple[str, ...] = ()  # settings that an own question answers
    holds: Mapping[str, str] = field(default_factory=dict)  # what a path must hold here, where that is not the usual
    shown: tuple[str, ...] = ()  # not asked, but shown in the review
    then: tuple[str, ...] = ()  # the flows that make sense once this one went well, the usual one first
    reviewed: bool = True  # false for what only looks, and starts without a review


COMPARED = ("adapter", "other_adapter", "third_adapter")  # one question each, where the command takes a list
JUDGED_BY = ("checkpoint_dir", "model_variant", "dataset_dir")  # asked where no run of a compared adapter says it
FLOWS = {  # the menu, in the order of work; a flow that is added here is in it
    flow.key: flow
    for flow in (
        Flow(
            key="build-dataset",
            title="List songs",
            note="what you have, and what is known of each",
            config_class=BuildDatasetConfig,
            basic=("input", "tag"),
            then=("preprocess",),
        ),
        Flow(
            key="describe",
            title="Describe the songs",
            note="the language model listens and writes captions",
            config_class=BuildDatasetConfig,
            basic=("input", "checkpoint_dir", "caption", "lyrics"),
            then=("preprocess",),
        ),
        Flow(
            key="preprocess",
            title="Preprocess",
            note="make the songs readable for training, once",
            config_class=PreprocessConfig,
            basic=("songs", "checkpoint_dir", "model_variant", "tensor_output"),
            covered=("audio_dir", "dataset_json"),
            then=("train", "estimate"),
        ),
        Flow(
            key="estimate",
            title="Measure ranks",
            note="optional: which parts of the model your music needs",
            config_class=EstimateConfig,
            basic=("checkpoint_dir", "model_variant", "timestep_mode", "dataset_dir", "preset"),
            then=("train",),
        ),
        Flow(
            key="train",
            title="Train",
            note="learn an adapter from your songs",
            config_class=TrainConfig,
            basic=(
                *("checkpoint_dir", "model_variant", "timestep_mode", "dataset_dir", "output_dir"),
                *("preset", "adapter_type", "rank", "epochs"),
            ),
            then=("sample", "score", "export"),
        ),
        Flow(
            key="train-lm",
            title="Train the composer",
            note="teach the language model tempo and form",
            config_class=TrainLmConfig,
            basic=("checkpoint_dir", "model_variant", "dataset_dir", "output_dir", "epochs"),
            shown=("lm", "rank", "val_split"),
            then=("sample",),
        ),
        Flow(
            key="sample",
            title="Listen",
            note="make music with and without an adapter",
            config_class=SampleConfig,
            basic=("checkpoint_dir", "model_variant", "timestep_mode", "adapter", "think", "lm_adapter", "prompt"),
            shown=("lyrics", "duration", "strength"),
            then=("export", "sample"),
        ),
        Flow(
            key="score",
            title="Judge",
            note="which checkpoint of a run to take",
            config_class=ScoreConfig,
            basic=("run_folder",),
            shown=("strength",),
            then=("sample", "export", "compare"),
        ),
        Flow(
            key="export",
            title="Export",
            note="an adapter for another program",
            config_class=ExportConfig,
            basic=("adapter", "format"),
        ),
        Flow(
            key="compare",
            title="Compare",
            note="judge adapters of different runs or programs",
            config_class=CompareConfig,
            basic=COMPARED,
            covered=("adapters", *JUDGED_BY),
            shown=("strength", "output"),
            then=("sample", "export"),
        ),
        Flow(
            key="resume",
            title="Resume",
            note="go on with a run that was stopped, or longer",
            config_class=TrainConfig,
            basic=("run", "resume_from", "epochs"),
            covered=("checkpoint_dir", "dataset_dir", "output_dir"),
            holds={"output_dir": ""},
            then=("sample", "score", "export"),
        ),
        Flow(
            key="plan",
            title="Memory",
            note="would a training fit into a graphics card?",
            config_class=PlanConfig,
            basic=("model_variant", "preset", "rank", "chunk_duration"),
        ),
        Flow(
            key="history",
            title="Past runs",
            note="what was trained, and how well it went",
            config_class=HistoryConfig,
            basic=("folder",),
            reviewed=False,
        ),
        Flow(
            key="doctor",
            title="Doctor",
            note="what this computer offers, for a bug report",
            config_class=DoctorConfig,
            basic=(),
            reviewed=False,
        ),
        Flow(
            key="demo",
            title="Demo",
            note="all of it on a tiny model, in about a minute",
            config_class=DemoConfig,
            basic=("output_dir",),
        ),
    )
}
RUNS_READ, RUNS_OFFERED = 200, 30  # of a folder's runs, the newest: there may be thousands, and any can be typed
RUNS_TO_REPEAT = 3  # beside the presets
LAST_USED = {  # by what a path holds, or by its name: the settings that left one of the kind
    "checkpoints": ("checkpoint_dir",),
    "songs": ("input", "audio_dir"),
    "dataset.json": ("dataset_json",),
    "songs or dataset.json": ("dataset_json", "input", "audio_dir"),
    "tensors": ("dataset_dir",),
    "adapter": ("adapter",),
    "lm_adapter": ("lm_adapter",),
    "run": ("run_folder", "output_dir"),
}
FOR_ALL_RUNS = ("device", "precision")  # set once, under Settings
SECTION_MORE = (
    "No leaves all of them at the values that suit most music. Yes asks for each; the review shows what differs."
)
PRESET_MORE = (
    "They stand by the memory of the graphics card, and Doctor, in the menu, says what yours has. Take recommended if "
    "in doubt. The memory plan in the review says whether it fits."
)
LEFT_TO_PRESET = ("rank", "epochs")  # not asked where the preset sets it


@dataclass(frozen=True)
class Context:
    """What the flows know of the world: the values last used, how a path is checked, and where they started."""

    last_used: Mapping[str, Any] = field(default_factory=dict)
    check: Check = lambda _holds, _path: ""
    here: Path = Path()


def questions_of(flow: Flow, context: Context, advanced: bool = False) -> list[Question]:
    """The questions of a flow: the basic ones, and every setting without a default.

    In the advanced depth also all others, a section at a time, each section only if it is wanted.
    """
    options = options_of(flow.config_class)
    known = {*flow.basic, *flow.covered}
    basic = [*flow.basic, *(name for name, o in options.items() if o.required and name not in known)]
    questions = [question_of(name, flow, context) for name in basic]
    if not advanced:  # asked only where the model does not say it
        questions = [
            replace(
                question,
                when=is_in_doubt,
                choices=lambda answers, offered=question.choices: offered(answers)[1:],
                default=lambda _answers: "discrete",
            )
            if question.name == "timestep_mode"
            else replace(question, when=has_language_model)
            if question.name == "think"
            else question
            for question in questions
        ]
    if flow.config_class is CompareConfig:
        as_in_training = replace(flow, config_class=TrainConfig)
        questions += [
            replace(question_of(name, as_in_training, context), when=lies_in_no_run, depends_on=COMPARED)
            for name in JUDGED_BY
        ]
    for section, names in sections_of(flow.config_class).items() if advanced else ():
        rest = [name for name in names if name not in (*basic, *flow.covered)]
        if not rest:
            continue
        wanted = f"change {section}"
        help = ", ".join(name.replace("_", " ") for name in rest)
        questions.append(
            Question(wanted, f"Change {section}?", help, "yes-no", section, lambda _answers: False, more=SECTION_MORE)
        )
        for question in (question_of(name, flow, context) for name in rest):
            questions.append(
                replace(
                    question,
                    when=lambda answers, wanted=wanted, when=question.when: bool(answers.get(wanted)) and when(answers),
                    depends_on=(*question.depends_on, wanted),
                )
            )
    return questions


def lies_in_no_run(answers: Answers) -> bool:
    """Whether none of the adapters to compare lies in a run, which would say what to judge by."""
    return not any(run_of(Path(answers[name])) for name in COMPARED if answers.get(name))


def config_of(flow: Flow, answers: Answers, context: Context) -> Any:
    """The config that the answers make: what holds for all runs, then the preset, the answers. Raises UserError."""
    options = options_of(flow.config_class)
    base = {name: context.last_used[name] for name in FOR_ALL_RUNS if name in context.last_used and name in options}
    if "run" in answers:
        run = read_run(answers["run"])
        if run is None:
            raise UserError(f"{answers['run']}: no run there any more.")
        base = {name: value for name, value in run.settings.items() if name in options} | {"output_dir": answers["run"]}
    preset = {name: value for name, value in _preset_of(answers).items() if name in options}
    answered = {name: value for name, value in answers.items() if name in options}
    if "songs" in answers and not set(flow.covered) & set(answered):
        songs = answers["songs"]
        answered["dataset_json" if songs.suffix.lower() == ".json" else "audio_dir"] = songs
    if flow.config_class is CompareConfig:
        answered["adapters"] = tuple(answers[name] for name in COMPARED if answers.get(name))
    return resolve(flow.config_class, base, preset, answered)


def fitted(flow: Flow, answers: Answers) -> Flow:
    """The flow with the settings of the run that goes on, which may be one of the language model."""
    run = read_run(answers["run"]) if "run" in answers else None
    if run is None:
        return flow
    return replace(flow, config_class=TrainLmConfig if "lm" in run.settings else TrainConfig)


def sections_of(config_class: type) -> dict[str, list[str]]:
    """The names of a config's settings by section."""
    sections: dict[str, list[str]] = {}
    for name, o in options_of(config_class).items():
        sections.setdefault(o.group, []).append(name)
    return sections


def left_by(config: Any) -> dict[str, Any]:
    """What a config that was started leaves for the next action and the next session."""
    options = options_of(type(config))
    values = {
        name: getattr(config, name) for name, o in options.items() if o.kept and getattr(config, name) is not None
    }
    match config:
        case TrainLmConfig(output_dir=folder):
            values |= {"output_dir": folder, "lm_adapter": folder / "final", "think": True}
        case TrainConfig(output_dir=folder):
            values |= {"output_dir": folder, "run_folder": folder, "adapter": folder / "final"}
        case PreprocessConfig(tensor_output=folder):
            values["dataset_dir"] = folder
        case BuildDatasetConfig(output=output, input=folder):
            values["dataset_json"] = output or folder / "dataset.json"
    return values


def _preset_of(answers: Answers) -> dict[str, Any]:
    return dict(presets.find(answers["preset"]).values) if answers.get("preset") else {}


def question_of(name: str, flow: Flow, context: Context, current: Mapping[str, Any] = MappingProxyType({})) -> Question:
    """The question for a setting of a flow, or one of its own. Suggested is its `current` value, where it has one."""
    options = options_of(flow.config_class)
    if name not in options:
        return _compared_question(name, context) if name in COMPARED else _own_question(name, context)
    o = replace(options[name], holds=flow.holds.get(name, options[name].holds))

    def default(answers: Answers) -> Any:
        value = current[name] if name in current else _suggestion(o, flow, answers, context)
        offered = [choice.value for choice in o.offers(answers)] if o.offers else []
        return value if value in offered or not offered else offered[0]

    def when(answers: Answers) -> bool:
        preset_sets_it = not current and name in LEFT_TO_PRESET and name in _preset_of(answers)
        return matters(o, answers, options) and not preset_sets_it

    def choices(answers: Answers) -> tuple[Choice, ...]:
        return o.offers(answers) if o.offers else paths_offered(o, default(answers), context)

    offered = {"choices": choices} if o.type is Path else {}

    def why(answers: Answers) -> str:
        advice = _advice(o, flow, answers)
        value = advice.of(o.name) if advice else None
        return "" if advice is None or value is None else f"Suggested: {value:g} ({advice.reason})."

    question = from_option(o, default, context.check, when=when, why=why, **offered)
    voids = ("run",) if o.type is Path else ("run", "preset")
    return replace(question, depends_on=(*voids, *question.depends_on))


def paths_offered(o: Option, suggested: Any, context: Context) -> tuple[Choice, ...]:
    """What can be chosen besides typing, apart from what is suggested: what lies near, newest first, and was last used.

    A path that is to be written to is a new one beside the last.
    """
    match o.holds:
        case "checkpoints":
            near = likely_checkpoint_dirs(context.here)
        case "songs" | "dataset.json" | "songs or dataset.json":
            listed = [[folder / "dataset.json", folder] for folder in songs_near(context.here)]
            near = [path for pair in listed for path in pair if path.exists()]
        case "tensors" | "new folder" if o.holds == "tensors" or o.name == "tensor_output":
            near = tensors_near(context.here)
        case "adapter":
            runs = [run for run in runs_near(context) if ("lm" in run.settings) == (o.name == "lm_adapter")]
            near = [folder for run in runs for folder in (run.folder / "final", run.folder / "best") if folder.is_dir()]
        case "run":
            near = [run.folder for run in runs_near(context)]
        case "runs":
            near = [folder for folder in runs_folders(context) if folder.is_dir()]
        case "new run" if suggested:
            beside = (folder / Path(suggested).name for folder in runs_folders(context))
            near = [path for path in beside if not path.exists()]
        case _:
            near = []
    used = (context.last_used.get(name) for name in LAST_USED.get(o.name, LAST_USED.get(o.holds, ())))
    offered: dict[Path, Choice] = {}
    for path in (*near, *(Path(path) for path in used if path)):
        with suppress(UserError):  # not there any more
            glance(o.holds, path)
            offered.setdefault(path.absolute(), Choice(str(path), str(path)))
    if suggested:
        offered.pop(Path(suggested).absolute(), None)
    return tuple(offered.values())[:RUNS_OFFERED]


def runs_folders(context: Context) -> list[Path]:
    """Where runs are: `runs` here, and where the last one went."""
    last = context.last_used.get("output_dir")
    here = context.here / "runs"
    beside = Path(last).parent if last else here
    return [here] if beside.absolute() == here.absolute() else [here, beside]


def runs_near(context: Context) -> list[FoundRun]:
    """The runs of those folders, each folder's newest first."""
    return [run for folder in runs_folders(context) for run in itertools.islice(find_runs(folder), RUNS_READ)]


def _suggestion(o: Option, flow: Flow, answers: Answers, context: Context) -> Any:
    """The value to suggest: the run's that goes on, the preset's, what other answers make of it, the one last used."""
    if "run" in answers and (run := read_run(answers["run"])) and o.name in run.settings:
        return run.settings[o.name]
    preset, options = _preset_of(answers), options_of(flow.config_class)
    if o.name in preset:
        followed = [name for name in o.depends_on if name in answers and name in options]
        if all(answers[name] == preset.get(name, options[name].default) for name in followed):
            return preset[o.name]
    if o.name == "prompt" and context.last_used.get("dataset_json"):
        return a_prompt_of(Path(context.last_used["dataset_json"]))
    if (advice := _advice(o, flow, answers)) and advice.of(o.name) is not None:
        return advice.of(o.name)
    if o.suggest and (suggested := o.suggest(answers)) is not None:
        return suggested
    if o.name in context.last_used and (o.kept or o.name in FOR_ALL_RUNS):
        try:
            return o.check(context.last_used[o.name])
        except UserError:
            pass  # kept by a version that allowed it
    if o.holds == "checkpoints" and (found := likely_checkpoint_dirs(context.here)):
        return found[0]
    return "" if o.required else o.default


def _advice(o: Option, flow: Flow, answers: Answers) -> Advice | None:
    """What is suggested for the music of a new run, where this setting is part of it."""
    is_new = flow.config_class is TrainConfig and "run" not in answers
    return advice_for(answers) if is_new and o.name in SUGGESTED else None


SONGS = Option(
    name="songs",
    type=Path,
    default=MISSING,
    help="a folder of audio files, or a dataset.json made from one",
    more=(
        "A list made by List songs names each song with its caption, lyrics, tempo and key, and what you changed in it "
        "is what training reads. A folder goes by the text files beside the songs."
    ),
    flags=(),
    group="Preprocessing",
    holds="songs or dataset.json",
)
RUN = Option(
    name="run",
    type=Path,
    default=MISSING,
    help="the output folder of the run to go on with",
    more=(
        "It goes on from its newest saved state, exactly as if it had not been stopped. One that is finished can go on "
        "for more epochs."
    ),
    flags=(),
    group="Run",
    holds="run",
)


def _compared_question(name: str, context: Context) -> Question:
    """The question for one of the adapters to compare; those that were named before it are not offered again."""
    labels = dict(zip(COMPARED, ("First adapter", "Second adapter", "Third adapter"), strict=True))
    o = replace(
        options_of(ExportConfig)["adapter"],
        name=name,
        label=labels[name],
        plain="the final/ or best/ folder of a run, a checkpoint, or a file of any program",
        group="Judge",
    )
    if name == COMPARED[2]:
        o = replace(o, plain="a third one to compare them with; empty: none", default=None, optional=True)

    def near(answers: Answers) -> list[Choice]:
        named = [Path(answers[other]).absolute() for other in COMPARED if answers.get(other)]
        return [c for c in paths_offered(o, None, context) if Path(c.value).absolute() not in named]

    def default(answers: Answers) -> Any:
        return "" if o.optional or not near(answers) else near(answers)[0].value

    def choices(answers: Answers) -> tuple[Choice, ...]:
        return tuple(choice for choice in near(answers) if choice.value != default(answers))

    def verify(value: Path | None, answers: Answers) -> str:
        if value and any(value.resolve() == Path(answers[n]).resolve() for n in COMPARED if answers.get(n)):
            raise UserError("That one was named before.")
        return context.check(o.holds, value) if value else ""

    return from_option(o, default, context.check, choices=choices, verify=verify, on_disk=False)


def _own_question(name: str, context: Context) -> Question:
    """A question that is asked in place of settings, or before them: songs, run or preset."""
    used = context.last_used
    if name == "songs":
        last = next((used[key] for key in ("dataset_json", "audio_dir", "input") if used.get(key)), "")
        known = paths_offered(SONGS, last, context)
        return from_option(SONGS, lambda _answers: last, context.check, choices=lambda _answers: known)
    if name == "run":
        last = used.get("output_dir", "")
        choices = tuple(
            Choice(str(r.folder), str(r.folder), f"saved: {r.checkpoints[-1]}" + (", finished" if r.finished else ""))
            for r in itertools.islice((run for run in runs_near(context) if run.checkpoints), RUNS_OFFERED)
        )
        first = choices[0].value if choices else last
        return from_option(RUN, lambda _answers: first, context.check, choices=lambda _answers: choices)
    offered = (
        *(Choice(p.name, p.name, p.description) for p in presets.list_presets()),
        Choice("", "none", "the defaults of each setting"),
        *(
            Choice(str(run.folder / "config.json"), f"as {run.folder.name}", "the settings of that run")
            for run in itertools.islice(find_runs(context.here / "runs"), RUNS_TO_REPEAT)
        ),
    )
    names = [choice.value for choice in offered]
    tested = used.get("preset") == "quick_test"  # who saw that all works does not want a test again
    first = next(n for n in ("recommended" if tested else str(used.get("preset")), "recommended", "") if n in names)
    help = "a preset fills in the settings; the review lets you change each"
    return choose(name, "Preset", offered, default=first, section="Preset", help=help, more=PRESET_MORE)
