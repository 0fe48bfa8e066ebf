"""The wizard's flows: which settings each one asks for, with which defaults, and the config that comes out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.settings import path_checks as places
from sidestep.settings import presets
from sidestep.settings.config import COMMANDS, BuildDatasetConfig, DemoConfig, PreprocessConfig, TrainConfig
from sidestep.settings.option import Option, as_json_values, options_of, resolve
from sidestep.settings.path_checks import find_models, find_runs, likely_checkpoint_dirs, read_run, short_name
from sidestep.wizard.questionnaire import Answers, Choice, Question, from_option


@dataclass(frozen=True)
class Flow:
    """A way from the menu to a config. `basic`: what is asked without going into detail; the rest is a section away in the review."""

    key: str
    title: str
    config_class: type
    basic: tuple[str, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    with_preset: bool = False
    narrowed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # fewer choices than the setting has


OWN_QUESTIONS = ("songs", "run", "preset")  # asked in place of, or before, settings
CARRIED_PATHS = ("checkpoint_dir", "audio_dir", "dataset_json", "input", "dataset_dir", "output_dir", "adapter")
SONGS = {"audio_dir", "dataset_json"}  # what the question for songs answers
TRAIN_BASICS = ("checkpoint_dir", "model_variant", "dataset_dir", "output_dir", "preset", "rank", "epochs")
EXTRA_FLOWS = {  # key: (title, basic questions), for the commands that are there
    "estimate": (
        "Preprocessing++: find the ranks this music needs",
        ("checkpoint_dir", "model_variant", "dataset_dir", "preset"),
    ),
    "sample": (
        "Listen: make music with an adapter",
        ("checkpoint_dir", "model_variant", "adapter", "prompt", "lyrics", "duration", "strength"),
    ),
    "export": ("Export an adapter for another program", ("adapter", "format")),
    "plan": ("Plan memory: will it fit?", ("model_variant", "preset", "rank", "chunk_duration")),
}


def _flows() -> dict[str, Flow]:
    lora, lokr = ("lora", "dora"), ("lokr", "loha", "oft")
    flows = [
        Flow(
            "train-lora",
            "Train a LoRA",
            TrainConfig,
            TRAIN_BASICS,
            {"adapter_type": "lora"},
            True,
            {"adapter_type": lora},
        ),
        Flow(
            "train-lokr",
            "Train a LoKr",
            TrainConfig,
            TRAIN_BASICS,
            {"adapter_type": "lokr"},
            True,
            {"adapter_type": lokr},
        ),
        Flow(
            "preprocess",
            "Preprocess audio",
            PreprocessConfig,
            ("songs", "checkpoint_dir", "model_variant", "tensor_output"),
        ),
        Flow("build-dataset", "Build dataset", BuildDatasetConfig, ("input", "tag")),
        Flow("resume", "Resume a run", TrainConfig, ("run", "resume_from", "epochs")),
        Flow("demo", "Try the demo", DemoConfig, ("output_dir",)),
    ]
    for command, (title, basic) in EXTRA_FLOWS.items():
        if command in COMMANDS:
            config_class = COMMANDS[command].config
            flows.append(
                Flow(command, title, config_class, basic, with_preset=command in presets.COMMANDS_WITH_PRESETS)
            )
    return {flow.key: flow for flow in flows}


FLOWS = _flows()
FLOW_ORDER = (
    "train-lora",
    "train-lokr",
    "preprocess",
    "estimate",
    "build-dataset",
    "resume",
    "sample",
    "export",
    "plan",
)  # as in the menu


@dataclass(frozen=True)
class Surroundings:
    """What the flows know of the world: values carried over, and how to look into a folder of songs."""

    carried: Mapping[str, Any] = field(default_factory=dict)
    songs: Callable[[Path], str] = lambda folder: "songs"
    here: Path = Path()


def questions_of(flow: Flow, around: Surroundings, advanced: bool = False) -> list[Question]:
    """The questions of a flow: the basic ones; in the advanced depth also all others, a section at a time, each section only if wanted."""
    options = options_of(flow.config_class)
    required = [name for name, o in options.items() if o.required and name not in flow.basic and name not in flow.given]
    basic = [name for name in flow.basic if name in options or name in OWN_QUESTIONS] + _unless_covered(flow, required)
    questions = [_question(name, flow, options.get(name), around, {}) for name in basic]
    if advanced:
        for section, names in sections_of(flow.config_class).items():
            rest = [name for name in names if name not in basic and not (flow.key == "preprocess" and name in SONGS)]
            gate = f"change {section}"
            if rest:
                help = ", ".join(name.replace("_", " ") for name in rest)
                questions.append(
                    Question(gate, f"Change {section}?", help, "yes-no", section, default=lambda answers: False)
                )
            questions += [_behind(gate, _question(name, flow, options[name], around, {})) for name in rest]
    return questions


def questions_for(flow: Flow, around: Surroundings, names: list[str], current: Mapping[str, Any]) -> list[Question]:
    """Questions for these settings, each with its current value as the default: for changes in the review."""
    options = options_of(flow.config_class)
    return [_question(name, flow, options[name], around, current) for name in names]


def config_of(flow: Flow, answers: Answers, around: Surroundings) -> Any:
    """The config that the answers make: the user's settings, then the preset's, what the flow is about, what was answered. Raises UserError."""
    options = options_of(flow.config_class)
    base: dict[str, Any] = {
        name: around.carried[name] for name in ("device", "precision") if name in around.carried and name in options
    }
    if flow.key == "resume":
        run = read_run(answers["run"])
        if run is None:
            raise UserError(f"{answers['run']}: no run there any more.")
        base = {name: value for name, value in run.settings.items() if name in options} | {"output_dir": answers["run"]}
    preset = {name: value for name, value in _preset_values(answers).items() if name in options}
    given = {
        name: value for name, value in flow.given.items() if preset.get(name) not in flow.narrowed.get(name, ())
    }  # a DoRA preset under "Train a LoRA"
    answered = {name: value for name, value in answers.items() if name in options}
    if "songs" in answers and "audio_dir" not in answered and "dataset_json" not in answered:
        songs = answers["songs"]
        answered["dataset_json" if songs.suffix.lower() == ".json" else "audio_dir"] = songs
    return resolve(flow.config_class, base, preset, given, answered)


def sections_of(config_class: type) -> dict[str, list[str]]:
    """The names of a config's settings by section."""
    sections: dict[str, list[str]] = {}
    for name, o in options_of(config_class).items():
        sections.setdefault(o.group, []).append(name)
    return sections


def _behind(gate: str, question: Question) -> Question:
    return replace(
        question,
        when=lambda answers: bool(answers.get(gate)) and question.when(answers),
        depends_on=(*question.depends_on, gate),
    )


def _unless_covered(flow: Flow, required: list[str]) -> list[str]:
    covered = {"resume": set(required), "preprocess": SONGS}
    return [name for name in required if name not in covered.get(flow.key, set())]


def _preset_values(answers: Answers) -> dict[str, Any]:
    name = answers.get("preset") or ""
    return dict(presets.find(name).values) if name else {}


def _question(name: str, flow: Flow, o: Option | None, around: Surroundings, current: Mapping[str, Any]) -> Question:
    if name == "preset":
        return _preset_question(around)
    if name == "run":
        return _run_question(around)
    if name == "songs":
        return _songs_question(around)
    if flow.key == "resume" and name == "resume_from":
        return _resume_point_question()

    def default(answers: Answers) -> Any:
        if name in current:
            return current[name]
        return _default(name, o, flow, answers, around)

    more: dict[str, Any] = {}
    if o.type is Path:
        return _path_question(flow, o, default, around)
    if name == "model_variant" and "checkpoint_dir" in options_of(flow.config_class) and flow.key != "plan":
        return _model_question(o, default)
    if name in flow.narrowed:
        more["choices"] = lambda answers: tuple(Choice(value, value) for value in flow.narrowed[name])
    more["when"] = _RELEVANT.get(name, _always)
    if name == "rank" and not current:
        more["when"] = lambda answers: "rank" not in _preset_values(answers)  # what a preset sets is not asked again
    more["depends_on"] = ("preset", *_DEPENDS_ON.get(name, ()))
    return from_option(o, default, **more)


def _always(_answers: Answers) -> bool:
    return True


_RELEVANT: dict[str, Callable[[Answers], bool]] = {
    "lokr_factor": lambda a: a.get("adapter_type") == "lokr",
    "lokr_decompose_both": lambda a: a.get("adapter_type") == "lokr",
    "lokr_weight_decompose": lambda a: a.get("adapter_type") == "lokr",
    "snr_gamma": lambda a: a.get("loss_weighting") == "min_snr",
    "timestep_mu": lambda a: a.get("timestep_mode") != "discrete",
    "timestep_sigma": lambda a: a.get("timestep_mode") != "discrete",
}
_DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "model_variant": ("checkpoint_dir",),
    "dataset_dir": (),
    "output_dir": ("dataset_dir",),
    "tensor_output": ("songs", "audio_dir", "dataset_json"),
    "alpha": ("rank",),
    "lr": ("optimizer_type",),
    "snr_gamma": ("loss_weighting",),
    "resume_from": ("run",),
    "epochs": ("run",),
    **dict.fromkeys(("lokr_factor", "lokr_decompose_both", "lokr_weight_decompose"), ("adapter_type",)),
    **dict.fromkeys(("timestep_mu", "timestep_sigma"), ("timestep_mode",)),
}


def _default(name: str, o: Option, flow: Flow, answers: Answers, around: Surroundings) -> Any:
    preset = _preset_values(answers)
    if flow.key == "resume" and "run" in answers:
        run = read_run(answers["run"])
        if run and name in run.settings:
            return run.settings[name]
    if name == "alpha" and "rank" in answers and "alpha" not in preset:
        return 2.0 * answers["rank"]  # the ratio that the defaults have
    if name == "lr" and answers.get("optimizer_type") == "prodigy":
        return 1.0  # prodigy's own scale: its lr is a multiplier
    if name in preset and preset[name] in flow.narrowed.get(name, (preset[name],)):
        return preset[name]
    if name in flow.given:
        return flow.given[name]
    if name in around.carried and o.type is not Path:
        try:
            return o.check(around.carried[name])
        except UserError:
            pass  # carried over from a version that allowed it
    return "" if o.required else o.default


def _path_question(flow: Flow, o: Option, default: Callable[[Answers], Any], around: Surroundings) -> Question:
    look = {
        "checkpoint_dir": places.checkpoints,
        "dataset_dir": lambda path: places.tensors(path, around.songs),
        "audio_dir": around.songs,
        "input": around.songs,
        "dataset_json": places.dataset_list,
        "output_dir": places.new_run
        if flow.key.startswith("train")
        else None
        if flow.key == "resume"
        else places.new_folder,
        "tensor_output": places.new_folder,
        "adapter": places.adapter,
        "resume_from": lambda path: (
            ""
            if str(path) == "latest"
            else places.run(path.parent.parent if path.parent.name == "checkpoints" else path)
        ),
    }.get(o.name)

    def suggestion(answers: Answers) -> Any:
        value = default(answers)
        return value if value not in ("", None) and value != o.default else _path_default(o, flow, answers, around)

    plain = from_option(o, suggestion)

    def read(reply: Any, answers: Answers) -> Any:
        if isinstance(reply, str):
            reply = reply.strip().strip("\"'")  # terminals quote a folder that is dropped on them
        value = plain.read(reply, answers)
        if look is not None and value is not None:
            look(value)
        return value

    def tell(value: Any, _answers: Answers) -> str:
        return look(value) if look is not None and value is not None else ""

    return from_option(o, suggestion, read=read, tell=tell, depends_on=_DEPENDS_ON.get(o.name, ()))


def _path_default(o: Option, flow: Flow, answers: Answers, around: Surroundings) -> Any:
    carried = around.carried.get(o.name)
    match o.name:
        case "checkpoint_dir":
            found = [] if carried else likely_checkpoint_dirs(around.here)
            return carried or (found[0] if found else "")
        case "tensor_output":
            songs = answers.get("songs") or answers.get("audio_dir") or answers.get("dataset_json")
            return Path("tensors") / _name_of(songs) if songs else carried or ""
        case "output_dir" if flow.key.startswith("train"):
            data = answers.get("dataset_dir")
            return places.fresh(Path("runs") / _name_of(data)) if data else ""
        case "output_dir":
            return o.default if not o.required else carried or ""
        case "adapter" | "dataset_dir" | "input" | "audio_dir" | "dataset_json":
            return carried or ""
    return "" if o.required or o.default is None else o.default


def _name_of(path: Path) -> str:
    folder = path.parent if path.suffix.lower() == ".json" else path
    return folder.resolve().name or "songs"


def _model_question(o: Option, default: Callable[[Answers], Any]) -> Question:
    def models(answers: Answers) -> tuple[Choice, ...]:
        folder = answers.get("checkpoint_dir")
        found = [m for m in find_models(folder) if not m.problem] if folder else []
        return tuple(
            Choice(
                short_name(m.name),
                short_name(m.name),
                ", ".join(part for part in (m.variant, m.size, m.layout) if part),
            )
            for m in found
        )

    def first(answers: Answers) -> Any:
        values = [choice.value for choice in models(answers)]
        wanted = default(answers)
        return wanted if wanted in values else values[0] if values else wanted

    return from_option(o, first, text="Model", kind="choice", choices=models, depends_on=_DEPENDS_ON["model_variant"])


def _songs_question(around: Surroundings) -> Question:
    def read(reply: Any, _answers: Answers) -> Path:
        text = str(reply).strip().strip("\"'")
        if not text:
            raise UserError("This one needs an answer.")
        path = Path(text).expanduser()
        places.songs_or_list(path, around.songs)
        return path

    return Question(
        "songs",
        "Songs",
        "a folder of audio files, or a dataset.json made from one",
        "path",
        "Preprocessing",
        default=lambda answers: (
            around.carried.get("dataset_json") or around.carried.get("audio_dir") or around.carried.get("input") or ""
        ),
        read=read,
        tell=lambda value, answers: places.songs_or_list(value, around.songs),
    )


def _preset_question(around: Surroundings) -> Question:
    def choices(_answers: Answers) -> tuple[Choice, ...]:
        return (
            *(Choice(p.name, p.name, p.description) for p in presets.list_presets()),
            Choice("", "none", "the defaults of each setting"),
        )

    def first(answers: Answers) -> str:
        names = [choice.value for choice in choices(answers)]
        return next((name for name in (around.carried.get("preset"), "recommended") if name in names), "")

    help = "a preset fills in the settings; the review shows them all and lets you change each"
    return Question("preset", "Preset", help, "choice", "Preset", default=first, choices=choices)


def _run_question(around: Surroundings) -> Question:
    def choices(_answers: Answers) -> tuple[Choice, ...]:
        last = around.carried.get("output_dir")
        folders = dict.fromkeys([around.here / "runs", *([Path(last).parent] if last else [])])
        runs = {run.folder: run for folder in folders for run in find_runs(folder) if run.checkpoints}
        return tuple(
            Choice(str(r.folder), str(r.folder), f"saved: {r.checkpoints[-1]}" + (", finished" if r.finished else ""))
            for r in runs.values()
        )

    def read(reply: Any, _answers: Answers) -> Path:
        path = Path(str(reply).strip().strip("\"'")).expanduser()
        places.run(path)
        return path

    def first(answers: Answers) -> str:
        found = choices(answers)
        return found[0].value if found else str(around.carried.get("output_dir") or "")

    help = "the output folder of the run to go on with"
    return Question(
        "run",
        "Run",
        help,
        "path",
        "Run",
        default=first,
        choices=choices,
        read=read,
        tell=lambda value, answers: places.run(value),
    )


def _resume_point_question() -> Question:
    def choices(answers: Answers) -> tuple[Choice, ...]:
        run = read_run(answers["run"])
        folder = answers["run"] / "checkpoints"
        older = [Choice(folder / name, name) for name in reversed(run.checkpoints)] if run else []
        return (Choice(Path("latest"), "latest", "the newest one that is complete"), *older)

    help = "which saved state to go on from"
    return Question(
        "resume_from",
        "From",
        help,
        "choice",
        "Run",
        default=lambda a: Path("latest"),
        choices=choices,
        depends_on=_DEPENDS_ON["resume_from"],
    )


def for_later(values: Mapping[str, Any]) -> dict[str, Any]:
    """Carried values as they are kept for another session, which may start in another folder: paths in full."""
    return {
        name: Path(value).absolute().as_posix() if name in CARRIED_PATHS and value else value
        for name, value in values.items()
    }


def carried_from(config: Any) -> dict[str, Any]:
    """What a config that was started leaves for the next action and the next session."""
    names = (*CARRIED_PATHS, "model_variant", "rank", "alpha", "rank_min", "rank_max", "epochs")
    values = {name: value for name, value in as_json_values(config).items() if name in names and value is not None}
    if not isinstance(config, TrainConfig):
        values.pop("output_dir", None)
    if isinstance(config, PreprocessConfig):
        values["dataset_dir"] = config.tensor_output.as_posix()
    if isinstance(config, BuildDatasetConfig):
        values["dataset_json"] = (config.output or config.input / "dataset.json").as_posix()
    if isinstance(config, TrainConfig):
        values["adapter"] = (config.output_dir / "final").as_posix()
    return values
