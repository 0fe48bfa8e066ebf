"""Turbo models of other shifts, merges, and models for stems, through the commands that use them."""

import json
import math
import shutil
from html import unescape
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import pytest
import torch

from sidestep.acestep.attention import use_attention
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import encode_texts
from sidestep.data.records import load_record
from sidestep.errors import UserError
from sidestep.events import Decision, Notice
from sidestep.flow_matching.timesteps import turbo_timesteps
from sidestep.settings.config import EstimateConfig, SampleConfig, ScoreConfig
from sidestep.tasks import sample as sampling_module
from sidestep.tasks.estimate import estimate
from sidestep.tasks.estimate import run as estimate_run
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.sample import sample
from sidestep.tasks.score import run as score
from sidestep.tasks.score.captions import CAPTIONS
from sidestep.tasks.train import previews, setup, songs
from sidestep.tasks.train.songs import plan_windows
from tests.preprocessing import job, make_library
from tests.training_world import (
    CHECKPOINTS,
    Log,
    adapter,
    differing,
    prepared,
    run,
    settings,
    song,
    write_data,
)
from tests.wizard_world import Script, World


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), frames=(30, 30))


@pytest.fixture
def named(tmp_path):
    """A function: the tiny turbo model under another folder name, its config changed; → the folder of checkpoints."""

    def make(name: str, **changes) -> Path:
        home = tmp_path / "checkpoints"
        for part in ("vae", "Qwen3-Embedding-0.6B"):
            shutil.copytree(CHECKPOINTS / part, home / part)
        shutil.copytree(CHECKPOINTS / "acestep-v15-turbo", home / name)
        path = home / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return home

    return make


def decisions(events) -> dict[str, tuple[str, str]]:
    return {event.what: (event.value, event.reason) for event in events if isinstance(event, Decision)}


def sampling(home: Path, model: str, output: Path, **changes) -> tuple[dict, Log]:
    log, values = (
        Log(),
        {"checkpoint_dir": home, "model_variant": model, "device": "cpu", "strength": (0.0,), "prompt": "techno"},
    )
    [made] = sample(SampleConfig(**values | {"duration": 1.0, "output": output, "steps": 1} | changes), log)
    return json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))["sampling"], log


@pytest.mark.parametrize(
    ("typed", "shift", "why"),
    [(None, 1.0, "the folder is 'acestep-v15-turbo-shift1'"), (2.0, 2.0, "--timestep-shift typed")],
)
def test_a_turbo_of_another_shift_is_trained_heard_and_sampled_with_it(named, data, tmp_path, typed, shift, why):
    home, name = named("acestep-v15-turbo-shift1"), "acestep-v15-turbo-shift1"
    changes = {"checkpoint_dir": home, "model_variant": name, "timestep_shift": typed, "max_steps": 1}
    log = run(settings(data, tmp_path / "run", preview_prompt="techno", preview_duration=1.0, **changes))
    value, reason = decisions(log.events)["timesteps"]
    assert value == f"discrete, 8 steps, shift {shift:g}"
    assert reason.endswith(f"shift: {why}")
    page = unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert f"discrete, 8 steps, shift {shift:g}; no condition dropout: " in page
    assert f"shift: {why}." in page
    [heard] = (tmp_path / "run" / "previews").glob("epoch_*/*.json")
    assert json.loads(heard.read_text(encoding="utf-8"))["sampling"]["shift"] == shift
    [command] = log.events[-1].next_commands
    assert ("--shift 2" in command) == (typed is not None)
    made, told = sampling(home, name, tmp_path / "out", shift=typed)
    assert made["shift"] == shift
    assert ("acestep-v15-turbo-shift1" in decisions(told.events)["sampling"][1]) == (typed is None)


def test_a_shift_is_refused_where_the_law_has_none(named, data, tmp_path):
    home = named("acestep-v15-base", is_turbo=False, model_version="base")
    with pytest.raises(UserError, match=r"--timestep-shift 2: only turbo"):
        run(settings(data, tmp_path, checkpoint_dir=home, model_variant="base", timestep_shift=2.0))


MERGE = "acestep-v15-merge-base-turbo"


def test_a_merge_with_contradictory_signs_is_refused_without_a_mode_and_trained_with_one(named, data, tmp_path):
    home = named(MERGE)
    changes = {"checkpoint_dir": home, "model_variant": MERGE}
    with pytest.raises(UserError, match=r"is_turbo=true.*but.*merge-base-turbo") as refused:
        run(settings(data, tmp_path / "run", **changes))
    assert "--timestep-mode logit-normal" in refused.value.fix
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match="but the folder is called"):
        estimate(EstimateConfig(dataset_dir=data, device="cpu", **changes), Log())
    as_base = prepared(settings(data, tmp_path / "run", timestep_mode="logit-normal", **changes)).law
    assert as_base.name.startswith("logit-normal")
    assert as_base.cfg_ratio == 0.15
    assert prepared(settings(data, tmp_path / "run", timestep_mode="discrete", **changes)).law.cfg_ratio == 0.0


def cumulative(t: float) -> float:
    """The share of the logit-normal law of base and sft up to t: of the larger of two draws."""
    return NormalDist(-0.4, 1.0).cdf(math.log(t / (1 - t))) ** 2


@pytest.mark.parametrize(("shift", "first"), [(None, 0.3), (1.0, 0.125)])
def test_a_merge_as_turbo_draws_its_eight_timesteps_in_twenty_thousand(named, data, tmp_path, shift, first):
    changes = {"checkpoint_dir": named(MERGE, is_turbo=False, model_version="base"), "model_variant": MERGE}
    objective = prepared(settings(data, tmp_path, timestep_mode="discrete", timestep_shift=shift, **changes)).objective
    drawn = torch.cat([objective.timesteps(step, 4) for step in range(5_000)])
    found, counts = drawn.unique(return_counts=True)
    assert found.tolist() == pytest.approx(turbo_timesteps(shift or 3.0).flip(0).tolist())
    assert found[0].item() == pytest.approx(first)
    assert max(abs(counts - 2_500)) < 4 * (5_000 / 4) ** 0.5
    assert not any(objective.drops_all(step, 1) for step in range(1_000))


def test_a_merge_as_base_draws_that_law_and_drops_its_share_in_twenty_thousand(named, data, tmp_path):
    changes = {"checkpoint_dir": named(MERGE), "model_variant": MERGE, "timestep_mode": "logit-normal"}
    objective = prepared(settings(data, tmp_path, **changes)).objective
    drawn = torch.cat([objective.timesteps(step, 4) for step in range(5_000)])
    for t in (0.2, 0.4, 0.5, 0.6, 0.8):
        # stratified: of the four samples of a step at most one is in doubt, a coin of the share's fractional part
        share, deviation = cumulative(t), (5_000 * 0.25) ** 0.5
        assert abs(int((drawn <= t).sum()) - 20_000 * share) < 4 * deviation, t
    dropped = sum(objective.drops_all(step, 1) for step in range(20_000))
    assert abs(dropped - 20_000 * 0.15) < 4 * (20_000 * 0.15 * 0.85) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "law"),
    [
        ("discrete", "discrete, 8 steps, shift 3; no condition dropout: "),
        ("logit-normal", "logit-normal, mu -0.4, sigma 1; condition dropped in 15 % of samples: "),
    ],
)
def test_a_merge_goes_on_bit_for_bit_and_the_report_tells_its_law_and_why(named, data, tmp_path, mode, law):
    changes = {"checkpoint_dir": named(MERGE), "model_variant": MERGE, "timestep_mode": mode, "epochs": 3}
    changes |= {"gradient_accumulation": 1, "scheduler_type": "constant"}
    run(settings(data, tmp_path / "whole", **changes))
    run(settings(data, tmp_path / "cut", max_steps=3, **changes))
    run(settings(data, tmp_path / "cut", resume_from=Path("latest"), **changes))
    assert list(differing(adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "cut" / "final"))) == []
    page = unescape((tmp_path / "cut" / "report.html").read_text(encoding="utf-8"))
    assert f"{law}config.json says is_turbo=true" in page
    assert "; --timestep-mode typed" in page
    other = {"discrete": "logit-normal", "logit-normal": "discrete"}[mode]
    with pytest.raises(UserError, match="--timestep-mode"):
        run(settings(data, tmp_path / "cut", resume_from=Path("latest"), **changes | {"timestep_mode": other}))


def test_a_merge_is_sampled_as_its_mode_says_and_warned_of_without(named, tmp_path):
    home = named(MERGE)
    made, log = sampling(home, MERGE, tmp_path / "out")
    assert made["guidance"] == 1.0
    assert any("--timestep-mode" in event.message for event in log.of(Notice))
    made, log = sampling(home, MERGE, tmp_path / "out", timestep_mode="logit-normal")
    assert made["guidance"] == 7.0
    assert "config.json says is_turbo=true" in decisions(log.events)["sampling"][1]  # whatever is typed
    assert not any("--timestep-mode" in event.message for event in log.of(Notice))


@pytest.mark.parametrize(("name", "is_asked"), [(MERGE, True), ("acestep-v15-turbo", False)])
def test_the_wizard_asks_how_a_merge_makes_music_and_nobody_else(named, tmp_path, name, is_asked):
    from sidestep.wizard.flows import FLOWS, Context, config_of, questions_of
    from sidestep.wizard.questionnaire import Questionnaire

    home, world = named(name), World(tmp_path / "world")
    replies = {
        "checkpoint_dir": str(home),
        "model_variant": "turbo" if name.endswith("15-turbo") else name,
        "timestep_mode": "logit-normal",
        "dataset_dir": str(world.tensors),
        "output_dir": str(tmp_path / "new"),
    }
    script = Script(replies)
    flow = FLOWS["train"]
    answers = Questionnaire(questions_of(flow, Context())).forward(script)
    assert ("timestep_mode" in script.names) == is_asked
    if is_asked:
        asked = next(prompt for prompt in script.asked if prompt.name == "timestep_mode")
        assert [choice.value for choice in asked.choices] == ["discrete", "logit-normal"]
    assert config_of(flow, answers, Context()).timestep_mode == ("logit-normal" if is_asked else "auto")


def test_a_model_for_stems_gets_captions_in_its_own_form_everywhere(named, tmp_path):
    home, name = named("acestep-v15-stems", is_lego_sft=True), "acestep-v15-stems"
    library = make_library(tmp_path / "songs", ["a.wav"])
    plain, stems = tmp_path / "plain", tmp_path / "stems"
    preprocess(job(library, plain), Log())
    preprocess(job(library, stems, checkpoint_dir=home, model_variant=name), Log())
    texts = [load_record(folder / "a.wav.pt").metadata["prompt"] for folder in (plain, stems)]
    assert "# Caption\nsong 0\n\n" in texts[0]
    assert "# Caption\nGlobal: \nLocal: song 0\nMask Control: false\n\n" in texts[1]
    made = load_record(stems / "a.wav.pt")
    described = song("a", made.target_latents, made.encoder_hidden_states, metadata=made.metadata)
    window = plan_windows(described, 5, 25.0, 5, settings(Path(), Path()), is_stems=True).texts[0]
    assert "Local: song 0\nMask Control: false" in window.prompt


@pytest.mark.slow
@pytest.mark.parametrize("is_stems", [False, True])
def test_windows_previews_and_sample_tell_a_model_for_stems_their_captions_in_its_form(
    named, data, tmp_path, monkeypatch, is_stems
):
    home, name, told = named("acestep-v15-stems", is_lego_sft=is_stems), "acestep-v15-stems", []
    for module in (songs, previews, sampling_module):

        def encode(checkpoint, texts, *place, real=module.encode_texts):
            told.extend(text.prompt for text in texts)
            return real(checkpoint, texts, *place)

        monkeypatch.setattr(module, "encode_texts", encode)
    changes = {"checkpoint_dir": home, "model_variant": name, "chunk_duration": 1.0, "max_steps": 1}
    run(settings(data, tmp_path / "run", preview_prompt="techno", preview_duration=1.0, **changes))
    sampling(home, name, tmp_path / "out", prompt="a walk")
    expected = {"song 0", "song 1", "techno", "a walk"}
    assert {line for prompt in told for line in prompt.splitlines() if line in expected} == (
        set() if is_stems else expected
    )
    form = {f"Global: \nLocal: {caption}\nMask Control: false\n" for caption in expected}
    assert {caption for caption in form if any(caption in prompt for prompt in told)} == (form if is_stems else set())


@pytest.mark.parametrize("is_stems", [False, True])
def test_a_model_for_stems_is_judged_on_other_music_in_its_own_form(named, monkeypatch, is_stems):
    monkeypatch.setattr(score, "CAPTIONS", CAPTIONS[:1])
    model = open_checkpoint(named("acestep-v15-stems", is_lego_sft=is_stems), "acestep-v15-stems")
    place = torch.device("cpu"), torch.float32
    [(prompt, states)] = score.other_music(SimpleNamespace(checkpoint=model, device=place[0], dtype=place[1]))
    own, other = (
        next(encode_texts(model, [prompt.text_for(form)], *place)).states for form in (is_stems, not is_stems)
    )
    torch.testing.assert_close(states, own)
    assert states.shape != other.shape


def test_the_attention_and_the_weights_that_are_typed_are_those_that_compute(data, tmp_path, monkeypatch):
    """They give the same music, or nearly, so nothing but the choice itself would show that it was not taken."""
    asked: list[tuple[str, str]] = []
    load, weights = Checkpoint.load_decoder, []

    def loaded(checkpoint, device, dtype, quantize):
        weights.append(quantize)
        return load(checkpoint, device, dtype)

    def noted(decoder, request, *where):
        asked.append((request, weights[-1]))
        return use_attention(decoder, request, *where)

    monkeypatch.setattr(Checkpoint, "load_decoder", loaded)
    for module in (setup, sampling_module, estimate_run):
        monkeypatch.setattr(module, "use_attention", noted)
    typed = {"attention": "sdpa", "base_precision": "int8"}
    run(settings(data, tmp_path / "run", **typed, max_steps=1))
    sampling(CHECKPOINTS, "turbo", tmp_path / "out", **typed)
    measured = {"dataset_dir": data, "checkpoint_dir": CHECKPOINTS, "output": tmp_path / "rank_map.json"}
    estimate(EstimateConfig(**measured, **typed, device="cpu", batches="8"), Log())
    assert asked == [("sdpa", "int8")] * 3
    score.score(ScoreConfig(run_folder=tmp_path / "run", attention="local", base_precision="nf4", clips=0), Log())
    assert set(asked[3:]) == {("local", "nf4")}
