"""Trained on one model, heard on another: `--preview-variant` in a run, in `sample` and in the planner."""

import gc
import json
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sidestep.acestep.blocks import set_aside
from sidestep.acestep.checkpoint import Checkpoint
from sidestep.acestep.device import GIB, GpuMemory, with_overhead
from sidestep.cli.main import main
from sidestep.data.records import Record, index_records, save_record
from sidestep.errors import ExitStatus, UserError
from sidestep.events import Notice, Table, null
from sidestep.settings.config import PlanConfig, SampleConfig, TrainConfig
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.plan import plan as plans
from sidestep.tasks.plan.plan import as_json, check_memory, check_sample, fit_into, plan
from sidestep.tasks.plan.step import Peak
from sidestep.tasks.sample import Sampling, players_of
from sidestep.tasks.train import previews as module
from sidestep.tasks.train.checkpoints import read_checkpoint
from sidestep.tasks.train.previews import make_previews
from sidestep.tasks.train.report import previews_in
from tests.tasks.train.test_previews import files, state_of
from tests.training_world import Log, adapter, base_beside_turbo, differing, prepared, run, settings, write_data


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The fixtures' turbo, and a base model with other weights beside it."""
    return base_beside_turbo(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("tensors"), torch.Generator().manual_seed(0)
    for name, frames in (("a", 24), ("b", 30)):
        latents, conditions = (torch.randn(n, width, generator=generator) for n, width in ((frames, 8), (12, 32)))
        save_record(folder / f"{name}.pt", Record(latents, conditions, {"caption": f"song {name}"}))
    return folder


def asked(home: Path, data: Path, output: Path, **changes) -> TrainConfig:
    small = {"model_variant": "base", "rank": 2, "alpha": 4.0, "lr": 1e-2, "gradient_accumulation": 1}
    small |= {"dropout": 0.1, "preview_duration": 1.0, "checkpoint_dir": home}
    return settings(data, output, **small | changes)


def listening(home: Path, data: Path, output: Path, **changes) -> TrainConfig:
    heard = {"preview_every": 1, "preview_prompt": "techno", "preview_variant": ("base", "turbo")}
    return asked(home, data, output, **heard | changes)


@pytest.fixture(scope="module")
def heard(home, data, tmp_path_factory) -> Path:
    """A run on base that plays its adapter on base and on turbo after each epoch."""
    folder = tmp_path_factory.mktemp("heard") / "run"
    run(listening(home, data, folder))
    return folder


def same(a, b) -> bool:
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.slow
def test_a_run_that_is_heard_elsewhere_has_the_weights_and_the_optimizer_of_one_that_is_not(
    heard, home, data, tmp_path
):
    run(asked(home, data, tmp_path / "run"))
    states = [read_checkpoint(complete_checkpoints(folder)[-1])[0] for folder in (heard, tmp_path / "run")]
    for name in ("adapter", "optimizer", "average", "songs"):
        assert same(states[0][name], states[1][name]), name
    assert not same(states[0]["adapter"], {k: v + 1e-9 for k, v in states[1]["adapter"].items()})
    assert [p["loss"] for p in states[0]["history"]["points"]] == [p["loss"] for p in states[1]["history"]["points"]]


@pytest.mark.slow
def test_a_run_that_is_heard_elsewhere_goes_on_bit_for_bit(home, data, tmp_path):
    changes = {"scheduler_type": "constant", "preview_variant": ("turbo",)}
    run(listening(home, data, tmp_path / "run", max_steps=1, **changes))
    run(listening(home, data, tmp_path / "run", resume_from=Path("latest"), **changes))
    run(asked(home, data, tmp_path / "whole", scheduler_type="constant"))
    assert not list(differing(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "run" / "final")))
    assert "on-turbo/epoch_0002/01-techno.flac" in files(tmp_path / "run" / "previews")


@pytest.mark.slow
def test_each_model_plays_as_it_is_played_and_the_report_has_both(heard):
    takes = [f"{take}/01-techno" for take in ("base", "epoch_0001", "epoch_0002")]
    expected = [f"{place}{take}.{kind}" for place in ("", "on-turbo/") for take in takes for kind in ("flac", "json")]
    assert files(heard / "previews") == sorted(expected)
    own, turbo = (
        json.loads((heard / "previews" / place / "01-techno.json").read_text("utf-8"))
        for place in ("epoch_0002", "on-turbo/epoch_0002")
    )
    assert (own["checkpoint"], own["sampling"]) == ("acestep-v15-base", asdict(Sampling(32, 7.0)))
    assert (turbo["checkpoint"], turbo["sampling"]) == ("acestep-v15-turbo", asdict(Sampling(8, 1.0)))
    entries = previews_in(heard)
    assert [(entry["model"], len(entry["takes"])) for entry in entries] == [("", 2), ("turbo", 2)]
    assert entries[1]["base"] == "previews/on-turbo/base/01-techno.flac"
    assert "played on turbo" in (heard / "report.html").read_text("utf-8")


def test_the_previews_are_what_sample_plays_of_the_finished_adapter(heard, home, tmp_path, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    words = ["sample", "--checkpoint-dir", str(home), "--adapter", str(heard / "final"), "--prompt", "techno"]
    words += ["--duration", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["--plain", "--yes", *words, "--preview-variant", "base", "turbo"]) == ExitStatus.OK
    ends = [f"{model}-strength{strength}" for model in ("base", "turbo") for strength in (0, 1)]
    made = {end: tmp_path / "out" / f"techno-seed42-{end}.flac" for end in ends}
    assert sorted(made.values()) == sorted((tmp_path / "out").glob("*.flac"))
    for end, place in zip(ends, ("base", "epoch_0002", "on-turbo/base", "on-turbo/epoch_0002"), strict=True):
        assert made[end].read_bytes() == (heard / "previews" / place / "01-techno.flac").read_bytes(), end


@pytest.mark.slow
@pytest.mark.parametrize("adapter_type", ["dora", "lokr", "oft"])
def test_other_models_leave_modes_weights_and_random_numbers_as_they_were(home, data, tmp_path, adapter_type):
    trained = prepared(listening(home, data, tmp_path, adapter_type=adapter_type, preview_variant=("turbo",)))
    before, places = state_of(trained), [p.data_ptr() for p in trained.parameters]
    make_previews(trained, trained.previews)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(trained), strict=True))
    assert [p.data_ptr() for p in trained.parameters] == places
    assert files(tmp_path / "previews") == [
        f"on-turbo/{take}/01-techno.{kind}" for take in ("base", "epoch_0000") for kind in ("flac", "json")
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_other_model_comes_when_the_trained_one_has_left_and_is_gone_before_it_returns(
    home, data, tmp_path, monkeypatch, fails
):
    log, loaded, order = Log(), [], []
    trained = prepared(listening(home, data, tmp_path, preview_variant=("turbo",)))
    trained.report = log

    @contextmanager
    def watched(model):
        order.append("left")
        with set_aside(model):
            yield
            gc.collect()
            order.append("the other is gone" if loaded[-1]() is None else "the other is still there")
        order.append("back")

    load = Checkpoint.load_decoder

    def loading(self, *place):
        order.append(self.folder.name)
        decoder = load(self, *place)
        loaded.append(weakref.ref(decoder))
        if fails:
            decoder.forward = None  # it is held by the frames of the error
            raise torch.OutOfMemoryError("no room")
        return decoder

    monkeypatch.setattr(module, "set_aside", watched)
    monkeypatch.setattr(Checkpoint, "load_decoder", loading)
    make_previews(trained, trained.previews)
    assert order == ["left", "acestep-v15-turbo", "the other is gone", "back"]
    told = [event.message for event in log.of(Notice)]
    assert told == (["No previews this time: no room"] if fails else [])


class Placed:
    """Stands for a tensor on a card that this machine has not: as much of one as a move needs."""

    shape, dtype = (2, 3), torch.int8

    def __init__(self, device: str, memory: object, requires_grad: bool = False):
        self.device, self.memory, self.requires_grad = torch.device(device), memory, requires_grad

    @property
    def data(self):
        return self

    @data.setter
    def data(self, other):
        self.device, self.memory = other.device, other.memory

    def data_ptr(self) -> int:
        return id(self.memory)

    def stride(self) -> tuple[int, int]:
        return (3, 1)

    def to(self, device):
        return Placed(str(device), object())


def test_frozen_weights_leave_the_device_and_what_is_trained_stays(monkeypatch):
    monkeypatch.setattr("sidestep.acestep.blocks.Tensor", Placed)
    memory = object()
    weight, table = Placed("cuda:1", memory), Placed("cuda:1", object())
    swapped, adapter = Placed("cpu", object()), Placed("cuda:1", object(), requires_grad=True)
    of_state = Placed("cuda:1", memory)  # bitsandbytes keeps the packed weight twice, in the same memory
    layer = SimpleNamespace(state=SimpleNamespace(CB=of_state, threshold=0.0))
    model = SimpleNamespace(
        modules=lambda: [layer], parameters=lambda: [weight, swapped, adapter], buffers=lambda: [table]
    )
    stays = swapped.memory, adapter.memory
    with set_aside(model):
        assert [t.device.type for t in (weight, table, of_state, swapped)] == ["cpu"] * 4
        assert weight.memory is of_state.memory
    assert [str(t.device) for t in (weight, table, of_state, adapter)] == ["cuda:1"] * 4
    assert weight.memory is of_state.memory is not memory
    assert (swapped.device.type, swapped.memory, adapter.memory) == ("cpu", *stays)


def test_a_model_of_another_size_is_refused_with_the_reason(home, data, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        UserError, match=r"--preview-variant xl-turbo: .* does not fit on it: .* there, .* here"
    ) as said:
        run(listening(home, data, tmp_path / "run", preview_variant=("turbo", "xl-turbo")))
    assert "same size" in said.value.fix
    assert not (tmp_path / "run" / "final").exists()
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    words = ["plan", "--checkpoint-dir", str(home), "--model-variant", "base", "--preview-variant", "xl-turbo"]
    assert main(["--plain", *words]) == ExitStatus.USAGE
    assert "hidden_size" in capsys.readouterr().err


def test_windows_other_music_and_all_players_share_one_reading_of_the_text_models(home, tmp_path, monkeypatch):
    read, models = [], []
    originals = {name: getattr(Checkpoint, name) for name in ("load_text_encoder", "load_condition_encoder")}
    for name in originals:

        def load(checkpoint, *of, name=name, real=originals[name]):
            read.append((name, checkpoint.folder.name))
            found = real(checkpoint, *of)
            models.append(weakref.ref(found[0] if name == "load_text_encoder" else found))
            return found

        monkeypatch.setattr(Checkpoint, name, load)
    songs, others = write_data(tmp_path / "songs", (60, 41)), write_data(tmp_path / "others", (70,))
    made = prepared(listening(home, songs, tmp_path / "run", chunk_duration=1.0, prior_data=others))
    assert all(song.windows for song in (*made.songs, *made.prior.songs))
    assert len(made.previews.players) == 2
    own, other = "acestep-v15-base", "acestep-v15-turbo"
    assert read == [("load_text_encoder", own), *(("load_condition_encoder", name) for name in (own, other))]
    gc.collect()
    assert not any(model() for model in models), "nothing of them stays beside the decoder"


def test_a_model_that_is_not_there_is_refused_by_name(home, data, tmp_path):
    with pytest.raises(UserError, match="sft"):
        run(listening(home, data, tmp_path / "run", preview_variant=("sft",)))


@pytest.mark.slow
@pytest.mark.parametrize(("names", "most", "copied"), [(("turbo",), 3, True), (("base", "turbo"), 5, False)])
def test_the_planner_counts_the_model_that_plays(home, monkeypatch, names, most, copied):
    """Here guidance, with which base denoises two at once, makes a difference of 2 GiB."""
    monkeypatch.setattr("sidestep.tasks.plan.plan.preview_peak", lambda sizes, *_: (5 - 2 * sizes["is_turbo"]) * GIB)
    config = PlanConfig(checkpoint_dir=home, model_variant="base", vram=24.0, rank=8, song_seconds=4.0)
    log = Log()
    found = plan(replace(config, preview_variant=names), log)
    assert f"a preview of 30 s on {' and '.join(names)} while training" in dict(log.of(Table)[0].rows)
    peak = found.asked.peak
    beside = most * GIB + (peak.adapter if copied else 0)
    assert found.preview == with_overhead(peak.between_steps + beside)
    assert as_json(found)["ram_bytes"] == peak.weights
    assert "waits in RAM meanwhile" in dict(log.of(Table)[0].rows)


@pytest.mark.parametrize(("names", "refused"), [(("turbo",), False), (("base",), True), (("turbo", "base"), True)])
def test_sample_is_judged_by_the_model_that_takes_most(home, tmp_path, monkeypatch, names, refused):
    monkeypatch.setattr("sidestep.tasks.plan.plan.preview_peak", lambda sizes, *_: (5 - 2 * sizes["is_turbo"]) * GIB)
    monkeypatch.setattr("sidestep.tasks.plan.plan.gpu_memory", lambda _device: GpuMemory(4 * GIB, "a card"))
    config = SampleConfig(checkpoint_dir=home, prompt="x", preview_variant=names, device="cpu")
    with pytest.raises(UserError, match="would run out of memory") if refused else nullcontext():
        check_sample(config, null)


@pytest.fixture
def ram(monkeypatch):
    """Sets the RAM that is available. A step takes 1300 bytes, 1000 of them the weights unless blocks are swapped."""

    def peak(_planner, config):
        return Peak(500 if config.swap_blocks else 1000, 100, 50, 50, 0, 100)

    monkeypatch.setattr(plans.Planner, "peak", peak)
    monkeypatch.setattr(plans, "preview_peak", lambda *_: 0)
    return lambda available: monkeypatch.setattr(
        plans.psutil, "virtual_memory", lambda: SimpleNamespace(available=available)
    )


@pytest.mark.parametrize(("swap", "needed"), [(0, 1000), (2, 2000)])
def test_the_model_that_waits_while_another_plays_is_counted_in_ram(home, data, tmp_path, ram, swap, needed):
    config = listening(home, data, tmp_path, swap_blocks=swap, gradient_checkpointing=True)

    def judged(available: int, **changes) -> None:
        ram(available)
        fit_into(GpuMemory(GIB, "a card"), replace(config, **changes), null)

    judged(needed)
    with pytest.raises(UserError, match="--preview-variant base turbo: .* would wait in RAM, of which") as caught:
        judged(needed - 1)
    assert "Without --preview-variant" in caught.value.fix
    judged(needed - 1000, preview_variant=("base",))
    judged(needed - 1000, preview_every=0, preview_prompt="")
    judged(0, even_if_it_does_not_fit=True)


def test_on_a_cpu_the_other_model_is_counted_beside_the_run(home, data, tmp_path, ram):
    read = []

    def index(folder: Path):
        read.append(folder)
        return index_records(folder)

    def judged(available: int, **changes) -> None:
        ram(available)
        check_memory(listening(home, data, tmp_path, **changes), null, index)

    judged(2300)
    with pytest.raises(UserError, match="--preview-variant base turbo: .* would wait in RAM beside"):
        judged(2299)
    judged(0, preview_variant=("base",))
    assert read == [data] * 3
    judged(0, preview_variant=())
    judged(0, preview_every=0, preview_prompt="")
    assert read == [data] * 3, "who hears no other model is not kept waiting for a plan"


def test_a_run_is_warned_by_the_preview_of_the_model_that_plays(home, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.tasks.plan.plan.preview_peak", lambda sizes, *_: (5 - 2 * sizes["is_turbo"]) * GIB)
    for names, warned in ((("turbo",), False), (("base",), True)):
        log = Log()
        fit_into(GpuMemory(5 * GIB, "a card"), listening(home, data, tmp_path, preview_variant=names), log)
        assert ("A preview needs" in log.text) == warned


def test_a_model_that_is_to_play_and_is_not_there_is_named_with_its_flag(tmp_path):
    config = replace(settings(tmp_path, tmp_path / "run"), preview_variant=("sft",))
    with pytest.raises(UserError, match="--preview-variant sft: no folder"):
        players_of(config, null)
