"""Previews: audio while training goes on, which must go on as if nothing had been heard."""

import gc
import json
import os
import random
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Qwen3Model

from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import Prompt
from sidestep.data.records import Record, save_record
from sidestep.errors import UserError
from sidestep.events import Event, LongTask, Notice, Progress, Saved, null
from sidestep.settings.config import SampleConfig, TrainConfig
from sidestep.tasks.sample import open_sampler, sample, sampling_for
from sidestep.tasks.train.previews import make_previews, previews_for, prompts_for
from sidestep.tasks.train.setup import open_accelerator, set_up, train
from tests.conftest import FIXTURES
from tests.several_processes import FSDP, finish, start
from tests.tasks.test_sample import filled_up
from tests.training_world import run, settings, write_data

CHECKPOINTS = FIXTURES / "checkpoints"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> Path:
    """Two songs of 24 and 30 frames that say what they are."""
    folder, generator = tmp_path_factory.mktemp("tensors"), torch.Generator().manual_seed(0)
    for name, frames, more in (
        ("a", 24, {"lyrics": "[00:01.00]la\n[00:02.00]lo", "language": "en"}),
        ("b", 30, {"bpm": 90, "keyscale": "A minor"}),
    ):
        latents, conditions = (torch.randn(n, width, generator=generator) for n, width in ((frames, 8), (12, 32)))
        save_record(
            folder / f"{name}.pt",
            Record(latents, conditions, {"caption": f"song {name}", "prompt_caption": f"tag, song {name}", **more}),
        )
    return folder


def config(tensors: Path, output: Path, **settings) -> TrainConfig:
    small = {
        "rank": 2,
        "alpha": 4,
        "epochs": 2,
        "gradient_accumulation": 1,
        "lr": 1e-2,
        "log_every": 1,
        "device": "cpu",
        "preview_duration": 1.0,
    }
    return TrainConfig(checkpoint_dir=CHECKPOINTS, dataset_dir=tensors, output_dir=output, **{**small, **settings})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def heard(tensors, tmp_path_factory) -> tuple[Path, list[Event]]:
    """A run with previews after each epoch and dropout in its adapter, and what it reported."""
    folder, events = tmp_path_factory.mktemp("heard") / "run", []
    train(config(tensors, folder, preview_every=1), events.append)
    return folder, events


def test_a_run_with_previews_trains_the_same_adapter_bit_for_bit_as_one_without(heard, tensors, tmp_path):
    train(config(tensors, tmp_path / "run"), null)
    with_previews, without = (
        load_file(folder / "final" / "adapter_model.safetensors") for folder in (heard[0], tmp_path / "run")
    )
    assert with_previews.keys() == without.keys()
    assert all(torch.equal(with_previews[name], without[name]) for name in without)
    assert not (tmp_path / "run" / "previews").exists()


def test_the_base_is_heard_once_and_the_adapter_after_each_epoch_beside_their_prompts(heard):
    names = ["01-tag-song-a", "02-tag-song-b"]
    folders = ["base", "epoch_0001", "epoch_0002"]
    assert files(heard[0] / "previews") == [
        f"{folder}/{name}.{kind}" for folder in folders for name in names for kind in ("flac", "json")
    ]
    saved = [Path(event.path).name for event in heard[1] if isinstance(event, Saved) and event.what == "previews"]
    assert saved == ["epoch_0001", "epoch_0002"]
    said = json.loads((heard[0] / "previews" / "epoch_0002" / "01-tag-song-a.json").read_text("utf-8"))
    assert (said["strength"], said["epoch"], said["step"], said["checkpoint"]) == (1.0, 2, 4, "acestep-v15-turbo")
    assert said["prompt"] == {
        "caption": "tag, song a",
        "lyrics": "la\nlo",
        "language": "en",
        "bpm": None,
        "keyscale": "",
        "timesignature": "",
        "duration": 1.0,
        "seed": 42,
    }
    audio = [(heard[0] / "previews" / folder / f"{names[0]}.flac").read_bytes() for folder in folders]
    assert len(set(audio)) == 3


def test_previews_are_what_sample_makes_of_the_base_and_of_the_finished_adapter(heard, tmp_path):
    prompt = {"prompt": "tag, song a", "lyrics": "la\\nlo", "language": "en", "duration": 1.0}
    asked = SampleConfig(
        checkpoint_dir=CHECKPOINTS, device="cpu", adapter=heard[0] / "final", output=tmp_path, **prompt
    )
    base, adapted = sample(asked, null)
    assert base.read_bytes() == (heard[0] / "previews" / "base" / "01-tag-song-a.flac").read_bytes()
    assert adapted.read_bytes() == (heard[0] / "previews" / "epoch_0002" / "01-tag-song-a.flac").read_bytes()


def test_diffusers_own_pipeline_plays_the_final_adapter_as_the_trainers_preview_did(heard):
    checkpoint = open_checkpoint(CHECKPOINTS, "turbo")
    text_encoder, tokenizer = checkpoint.load_text_encoder()
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    pipeline = AceStepPipeline(
        checkpoint.load_vae(),
        text_encoder,
        tokenizer,
        checkpoint.load_decoder(),
        checkpoint.load_condition_encoder(),
        scheduler,
    )
    pipeline.is_turbo = True
    said = json.loads((heard[0] / "previews" / "epoch_0002" / "01-tag-song-a.json").read_text(encoding="utf-8"))[
        "prompt"
    ]
    prompt = Prompt(**said)
    settings = {
        "prompt": prompt.caption,
        "lyrics": prompt.lyrics,
        "vocal_language": prompt.language,
        "bpm": prompt.bpm,
        "audio_duration": 5.12,
    }
    filled_up(pipeline, prompt.duration)
    sampling = sampling_for(checkpoint.variant)
    ours = open_sampler(checkpoint, pipeline.transformer, torch.device("cpu"), torch.float32, sampling, offload=False)

    def play() -> np.ndarray:
        steps = {"num_inference_steps": sampling.steps, "shift": sampling.shift}
        audio = pipeline(**settings, **steps, latents=ours.noise(prompt)).audios[0].numpy()
        audio = audio[:, : round(prompt.duration * 48_000)]  # whose peak is to be at -1 dBFS
        return audio * (10 ** (-1 / 20) / np.abs(audio).max())

    def preview(folder: str) -> np.ndarray:
        return soundfile.read(heard[0] / "previews" / folder / "01-tag-song-a.flac", dtype="float32")[0].T

    without = play()
    pipeline.load_lora_weights(str(heard[0] / "final"))
    np.testing.assert_allclose(without, preview("base"), rtol=0, atol=2e-5)
    np.testing.assert_allclose(play(), preview("epoch_0002"), rtol=0, atol=2e-5)
    assert np.abs(preview("epoch_0002") - preview("base")).max() > 1e-3


def test_tensorboard_gets_the_previews_as_audio(heard):
    events = EventAccumulator(str(next((heard[0] / "runs").iterdir())), size_guidance={"audio": 0})
    events.Reload()
    assert [e.step for e in events.Audio("previews/01-tag-song-a/strength 1")] == [2, 4]
    assert [e.step for e in events.Audio("previews/01-tag-song-a/strength 0")] == [0]


def state_of(run) -> list:
    return [
        torch.get_rng_state(),
        torch.tensor(np.random.get_state()[1].astype(np.int64)),
        torch.tensor(random.getstate()[1]),
        torch.tensor([module.training for module in run.model.modules()]),
        torch.tensor([parameter.requires_grad for parameter in run.model.parameters()]),
        *(parameter.detach().clone() for parameter in run.model.parameters()),
    ]


@pytest.mark.parametrize("adapter_type", ["lora", "dora", "lokr", "oft"])
def test_previews_leave_model_modes_and_random_numbers_as_they_were(tensors, tmp_path, adapter_type):
    asked = config(tensors, tmp_path, preview_prompt="x", adapter_type=adapter_type)
    trained = set_up(asked, null, *open_accelerator(asked, null))
    hidden = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    trained.objective.condition_mask.mask = hidden
    before = state_of(trained)
    make_previews(trained, trained.previews)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(trained), strict=True))
    assert trained.objective.condition_mask.mask is hidden
    assert files(tmp_path / "previews") == [
        f"{folder}/01-x.{kind}" for folder in ("base", "epoch_0000") for kind in ("flac", "json")
    ]
    trained.previews.made_at = -1
    stamp = (tmp_path / "previews" / "base" / "01-x.flac").stat().st_mtime_ns
    make_previews(trained, trained.previews)
    assert (tmp_path / "previews" / "base" / "01-x.flac").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(("offload", "after_each"), [(True, ["cpu"]), (False, [])])
def test_encoders_are_gone_before_training_and_an_offloaded_vae_returns_to_the_cpu(
    tensors, tmp_path, monkeypatch, offload, after_each
):
    moves: list[str] = []
    load_vae = Checkpoint.load_vae

    def watched(self, *place):
        vae = load_vae(self, *place)
        to = vae.to
        vae.to = lambda device: moves.append(str(device)) or to(device)
        return vae

    monkeypatch.setattr(Checkpoint, "load_vae", watched)
    asked = config(tensors, tmp_path, preview_prompt="x", offload_encoder=offload)
    before = [thing for thing in gc.get_objects() if isinstance(thing, Qwen3Model)]  # language models of other tests
    trained = set_up(asked, null, *open_accelerator(asked, null))
    gc.collect()
    assert not [t for t in gc.get_objects() if isinstance(t, Qwen3Model) and not any(t is b for b in before)]
    make_previews(trained, trained.previews)
    assert moves == [
        *after_each,
        *(["cpu", "cpu"] if offload else []),
    ]  # base and adapter: to the device and back, but loaded there at first


def test_previews_that_cannot_be_written_cost_a_warning_and_not_the_run(tensors, tmp_path):
    (tmp_path / "previews").write_text("in the way", "utf-8")
    events: list[Event] = []
    train(config(tensors, tmp_path, preview_every=1, epochs=1), events.append)
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    warnings = [e.message for e in events if isinstance(e, Notice) and e.level == "warning"]
    assert len(warnings) == 1
    assert warnings[0].startswith("No previews this time:")


def test_a_preview_that_takes_its_time_tells_its_steps(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr("sidestep.tasks.sample.LongTask", partial(LongTask, quiet_seconds=0.0))
    events: list[Event] = []
    train(config(tensors, tmp_path, max_steps=1, preview_prompt="x"), events.append)
    told = [(e.task, e.done) for e in events if isinstance(e, Progress) and e.task.endswith("music")]
    take = [("Making music", 0), ("Making music", 8), ("Decoding the music", 0), ("Decoding the music", 128)]
    assert told == 2 * take  # the base's and the adapter's


def test_a_run_that_ends_inside_an_epoch_names_its_previews_by_the_step(tensors, tmp_path):
    train(config(tensors, tmp_path, max_steps=1, preview_prompt="x", epochs=3), null)
    assert {path.split("/")[0] for path in files(tmp_path / "previews")} == {"base", "step_000001"}


PROMPTS = [
    (
        '["one", {"prompt": "two", "bpm": "90 BPM", "seed": 7, "duration": 3}]',
        [("one", None, 42, 1.0), ("two", 90, 7, 3.0)],
    ),
    ('{"prompts": [{"caption": "three"}]}', [("three", None, 42, 1.0)]),
]


@pytest.mark.parametrize(("text", "expected"), PROMPTS)
def test_prompts_come_from_a_file(tmp_path, text, expected):
    path = tmp_path / "prompts.json"
    path.write_text(text, "utf-8-sig")
    found = prompts_for(config(tmp_path, tmp_path, preview_prompts=path), [])
    assert [(p.caption, p.bpm, p.seed, p.duration) for p in found] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "no JSON"),
        ("[]", "no list of prompts"),
        ("3", "no list of prompts"),
        ('[{"prompt": "x"}, {"prompt": "y", "temp": 1}]', r"\$\[1\].temp: no such key"),
        ('[{"lyrics": "y"}]', r"\$\[0\].caption: is empty"),
    ],
)
def test_mistakes_in_the_prompts_file_are_named(tmp_path, text, said):
    path = tmp_path / "prompts.json"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=said):
        prompts_for(config(tmp_path, tmp_path, preview_prompts=path), [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
def test_prompts_from_a_pipe_are_refused_and_the_pipe_never_opened(tmp_path):
    path = tmp_path / "prompts.json"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.open("wb").close(), daemon=True).start()
    with pytest.raises(UserError, match="--preview-prompts .* is a pipe or a device"):
        prompts_for(config(tmp_path, tmp_path, preview_prompts=path), [])
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))  # the thread ends


def test_a_typed_prompt_has_the_lyrics_the_length_and_the_seed_that_were_typed(tmp_path):
    typed = {"preview_lyrics": "[Verse]\\nsoft rain", "preview_duration": 7.0, "preview_seed": 5}
    [prompt] = prompts_for(config(tmp_path, tmp_path, preview_prompt="slow jazz", **typed), [])
    assert (prompt.caption, prompt.lyrics) == ("slow jazz", "[Verse]\nsoft rain")
    assert (prompt.duration, prompt.seed) == (7.0, 5)


def test_without_prompts_there_are_no_previews_and_nothing_is_loaded(tmp_path):
    checkpoint = open_checkpoint(CHECKPOINTS, "turbo")
    assert previews_for(config(tmp_path, tmp_path), checkpoint, [], torch.device("cpu"), torch.float32, null) is None
    assert not checkpoint.loaded_keys
    with pytest.raises(UserError, match="Say it: --preview-prompt"):
        prompts_for(config(tmp_path, tmp_path, preview_every=1), [])


@pytest.mark.slow
@pytest.mark.parametrize("environment", [None, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_make_the_previews_of_one(tmp_path, environment):
    data = write_data(tmp_path / "data")
    asked = {
        "preview_every": 1,
        "preview_prompt": "x",
        "preview_duration": 1.0,
        "epochs": 1,
        "max_steps": 2,
        "lr": 1e-3,
        "val_split": 0.2,
    }
    run(settings(data, tmp_path / "one", gradient_accumulation=2, **asked))
    finish(start(data, tmp_path / "two", environment, gradient_accumulation=1, **asked), sharded=bool(environment))
    previews = files(tmp_path / "one" / "previews")
    assert previews
    assert files(tmp_path / "two" / "previews") == previews
    for name in (name for name in previews if name.endswith(".flac")):
        one, two = (
            soundfile.read(tmp_path / folder / "previews" / name, dtype="float32")[0] for folder in ("one", "two")
        )
        assert np.abs(one - two).max() < 1e-4, name
