"""Sampling: the pipeline's numbers, adapters at any strength, files beside their prompts, what a wrong call gets."""

import copy
import dataclasses
import json
import os
import re
import shutil
import threading
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AceStepPipeline, FlowMatchEulerDiscreteScheduler

from sidestep.acestep.blocks import BlockSwap, OffloadedModule
from sidestep.acestep.checkpoint import Checkpoint, open_checkpoint
from sidestep.acestep.conditions import Prompt, encode_texts
from sidestep.acestep.vae import decode
from sidestep.adapters.adapter import changed_weight
from sidestep.adapters.attach import adapter_scale, attach, load_adapter
from sidestep.adapters.names import to_diffusers
from sidestep.adapters.read import read_adapter
from sidestep.adapters.write import save_final
from sidestep.cli.parser import configs_of, parse
from sidestep.errors import JobError, UserError
from sidestep.events import Event, LongTask, Notice, Progress, null
from sidestep.settings.config import SampleConfig, TrainConfig
from sidestep.tasks.sample import Sampling, not_obeyed, open_sampler, prompt_of, sample, sampling_for, slug, write_take
from tests.conftest import FIXTURES

CPU = torch.device("cpu")
TWO_STEPS = Sampling(2, 1.0)
PROMPT = Prompt(
    caption="warm lofi, dusty",
    lyrics="[Verse]\nsoft rain",
    language="en",
    bpm=84,
    keyscale="D minor",
    timesignature="4",
    duration=1.3,
    seed=3,
)
KINDS = [
    ("lora", {}),
    ("dora", {}),
    ("lokr", {}),
    ("lokr", {"lokr_weight_decompose": True}),
    ("loha", {}),
    ("oft", {}),
]
kinds = pytest.mark.parametrize(
    ("adapter_type", "settings"), KINDS, ids=[f"{kind}-{'-'.join(more) or 'plain'}" for kind, more in KINDS]
)


@cache
def checkpoint(name: str = "turbo") -> Checkpoint:
    return open_checkpoint(FIXTURES / "checkpoints", name)


@cache
def states(name: str = "turbo") -> torch.Tensor:
    return next(encode_texts(checkpoint(name), [PROMPT.text_for(is_stems=False)], CPU, torch.float32)).states


@cache
def _decoder() -> torch.nn.Module:
    return checkpoint().load_decoder()


def decoder() -> torch.nn.Module:
    return copy.deepcopy(_decoder())


def latents(model: torch.nn.Module, sampling: Sampling = TWO_STEPS) -> torch.Tensor:
    return open_sampler(checkpoint(), model, CPU, model.dtype, sampling, offload=False).latents(PROMPT, states())


def config(**settings) -> TrainConfig:
    nowhere = Path("nowhere")
    return TrainConfig(
        checkpoint_dir=nowhere,
        dataset_dir=nowhere,
        output_dir=nowhere,
        **{"rank": 4, "alpha": 8, "dropout": 0.1, **settings},
    )


@torch.no_grad()
def trained(base: torch.nn.Module, **settings):
    """A model with an adapter that does something, as training leaves it."""
    model = attach(base, config(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "final"
    save_final(trained(decoder()), folder, config())
    return folder


@pytest.fixture(scope="module")
def base_checkpoints(tmp_path_factory) -> Path:
    """The fixtures with a model that says it is no turbo."""
    folder = tmp_path_factory.mktemp("base") / "checkpoints"
    shutil.copytree(FIXTURES / "checkpoints", folder, ignore=shutil.ignore_patterns("*xl*"))
    path = folder / "acestep-v15-turbo" / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text("utf-8")) | {"is_turbo": False, "model_version": "base"}), "utf-8"
    )
    return folder


def filled_up(pipeline: AceStepPipeline, duration: float) -> None:
    """Let diffusers' pipeline say `duration` in its prompt whatever `audio_duration` is, as the app of short clips."""
    encode = pipeline.encode_prompt
    pipeline.encode_prompt = lambda *args, **settings: encode(*args, **settings | {"audio_duration": duration})


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        ("turbo", Sampling(8, 1.0)),
        ("turbo", Sampling(8, 1.0, shift=1.0)),
        ("xl-turbo", Sampling(3, 1.0)),
        ("base", Sampling(32, 7.0)),
        ("base", Sampling(5, 2.0, shift=1.0)),
        ("base", Sampling(5, 1.0)),
    ],
)
def test_conditions_latents_and_audio_equal_those_of_diffusers_own_pipeline(name, sampling, base_checkpoints):
    ck = open_checkpoint(base_checkpoints, "turbo") if name == "base" else checkpoint(name)
    model = ck.load_decoder()
    ours = open_sampler(ck, model, CPU, torch.float32, sampling, offload=False)
    [conditions] = encode_texts(ck, [PROMPT.text_for(is_stems=False)], CPU, torch.float32)
    text_encoder, tokenizer = ck.load_text_encoder()
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    theirs = AceStepPipeline(ck.load_vae(), text_encoder, tokenizer, model, ck.load_condition_encoder(), scheduler)
    theirs.is_turbo = ck.variant.is_turbo
    theirs.set_progress_bar_config(disable=True)
    seen = {}
    theirs.condition_encoder.register_forward_hook(lambda module, inputs, output: seen.update(states=output[0]))
    filled_up(theirs, PROMPT.duration)
    settings = {
        "prompt": PROMPT.caption,
        "lyrics": PROMPT.lyrics,
        "vocal_language": PROMPT.language,
        "bpm": PROMPT.bpm,
        "keyscale": PROMPT.keyscale,
        "timesignature": PROMPT.timesignature,
        "audio_duration": 5.12,
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "shift": sampling.shift,
        "latents": ours.noise(PROMPT),
    }
    exact = theirs(**settings, output_type="latent").audios
    assert torch.equal(seen["states"], conditions.states)
    assert theirs.do_classifier_free_guidance == (sampling.guidance > 1)
    mine = ours.latents(PROMPT, conditions.states)
    torch.testing.assert_close(mine, exact, rtol=0, atol=1e-5)
    audio = torch.from_numpy(ours.audio(mine))[None]
    torch.testing.assert_close(audio, theirs(**settings).audios, rtol=0, atol=2e-6)


@kinds
def test_strength_0_is_the_base_model_and_1_the_trained_one_bit_for_bit(adapter_type, settings, tmp_path):
    base = latents(decoder())
    model = trained(decoder(), adapter_type=adapter_type, **settings)
    own = latents(model.get_base_model())
    save_final(model, tmp_path / "final", config(adapter_type=adapter_type, **settings))
    loaded = load_adapter(decoder(), read_adapter(tmp_path / "final"))
    with adapter_scale(loaded, 1.0) as inner:
        assert torch.equal(latents(inner), own)
    with adapter_scale(loaded, 0.0) as inner:
        assert torch.equal(latents(inner), base)
    assert not torch.equal(base, own)
    with adapter_scale(loaded, 1.0) as inner:
        assert torch.equal(latents(inner), own)


@kinds
@pytest.mark.parametrize("strength", [0.5, 1.5, -1.0])
def test_other_strengths_go_between_and_beyond_the_two_weights(adapter_type, settings, strength, tmp_path):
    save_final(
        trained(decoder(), adapter_type=adapter_type, **settings),
        tmp_path,
        config(adapter_type=adapter_type, **settings),
    )
    adapter = read_adapter(tmp_path)
    merged = decoder()
    with torch.no_grad():
        for name, factors in adapter.modules.items():
            weight = merged.get_submodule(to_diffusers(name)).weight
            weight.copy_(changed_weight(weight, factors, strength))
    with adapter_scale(load_adapter(decoder(), adapter), strength) as inner:
        torch.testing.assert_close(latents(inner), latents(merged), rtol=0, atol=1e-4)


def test_a_frozen_base_in_bf16_with_an_adapter_in_fp32_is_sampled_in_bf16():
    model = trained(decoder().to(torch.bfloat16))
    assert latents(model.get_base_model()).dtype == torch.bfloat16


def test_each_variant_gets_the_sampling_it_was_made_for(base_checkpoints):
    turbo, base = checkpoint().variant, open_checkpoint(base_checkpoints, "turbo").variant
    assert sampling_for(turbo) == Sampling(8, 1.0, 3.0)
    assert sampling_for(base) == Sampling(32, 7.0, 3.0)
    assert sampling_for(turbo, 4, 9.0, 1.0) == Sampling(4, 1.0, 1.0)
    assert sampling_for(base, 4, 1.0, 1.0) == Sampling(4, 1.0, 1.0)
    for name in ("sft", "xl-sft", "base-sft-fix-inst"):
        assert sampling_for(dataclasses.replace(base, name=name)) == Sampling(50, 7.0, 3.0)


@pytest.mark.parametrize(
    ("name", "steps", "shift", "told"),
    [
        ("turbo", 8, 3.0, []),
        ("turbo", 8, 1.0, []),
        ("turbo", 20, 2.0, ["--steps 20: turbo was distilled for 8 steps"]),
        ("turbo", 8, 2.6, ["--shift 2.6.*would take --shift 3"]),
        ("xl-turbo", 4, 5.0, ["--steps 4", "--shift 5.*would take --shift 3"]),
        ("turbo-continuous", 8, 4.5, []),
        ("turbo-continuous", 8, 6.0, ["--shift 6"]),
        ("base", 20, 6.0, []),
    ],
)
def test_turbo_warns_of_steps_and_shifts_that_it_was_not_distilled_for(name, steps, shift, told):
    variant = dataclasses.replace(checkpoint().variant, name=name, is_turbo="turbo" in name)
    found = not_obeyed(variant, Sampling(steps, 1.0, shift))
    assert len(found) == len(told)
    assert all(re.match(pattern, message) for pattern, message in zip(told, found, strict=True))


@pytest.mark.parametrize(("duration", "frames", "samples"), [(1.0, 128, 48_000), (5.12, 128, None), (5.2, 130, None)])
def test_short_clips_are_filled_up_for_the_model_and_heard_as_long_as_asked(duration, frames, samples):
    ours = open_sampler(checkpoint(), decoder(), CPU, torch.float32, TWO_STEPS, offload=False)
    prompt = dataclasses.replace(PROMPT, duration=duration)
    made = ours.latents(prompt, states())
    assert made.shape[1] == frames
    audio = ours.audio(made, prompt)
    assert audio.shape[1] == (samples or ours.audio(made).shape[1])
    assert np.abs(audio).max() == pytest.approx(10 ** (-1 / 20), rel=1e-4)


class Moving(torch.nn.Module):
    """A model that remembers where it was sent."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return self


@pytest.mark.parametrize(("offload", "sent"), [(True, ["cpu", "meta", "cpu"]), (False, [])])
def test_an_offloaded_module_is_on_the_device_only_while_it_is_used(offload, sent):
    model, loaded = Moving(), []
    part = OffloadedModule(lambda device: loaded.append(str(device)) or model, torch.device("meta"), offload)
    for _ in range(2):
        with part.in_use() as inside:
            assert inside is model
    assert (model.sent, loaded) == (sent, ["meta"])


def sample_config(checkpoints: Path, output: Path, **settings) -> SampleConfig:
    few = {"prompt": "a <b>song</b>", "duration": 1.0, "steps": 2, "device": "cpu"}
    return SampleConfig(checkpoint_dir=checkpoints, output=output, **{**few, **settings})


def test_sample_writes_audio_beside_its_prompt_and_the_same_again_for_the_same_seed(
    checkpoints, tmp_path, adapter_folder
):
    asked = sample_config(
        checkpoints,
        tmp_path,
        adapter=adapter_folder,
        strength=(0.0, 0.5, 1.0),
        keyscale="Am",
        timesignature="4/4",
        offload_encoder=True,
    )
    files = sample(asked, null)
    assert [file.name for file in files] == [f"a-b-song-b-seed42-strength{s}.flac" for s in ("0", "0.5", "1")]
    audio = {}
    for file, strength in zip(files, asked.strength, strict=True):
        audio[strength], rate = soundfile.read(file, dtype="float32")
        assert (rate, audio[strength].shape) == (48000, (48000, 2))
        assert np.abs(audio[strength]).max() == pytest.approx(10 ** (-1 / 20), abs=1e-4)
        facts = json.loads(file.with_suffix(".json").read_text("utf-8"))
        assert (facts["strength"], facts["audio"]) == (strength, file.name)
        assert facts["prompt"]["caption"] == "a <b>song</b>"
        assert (facts["prompt"]["keyscale"], facts["prompt"]["timesignature"]) == ("A minor", "4")
        assert facts["sampling"] == {"steps": 2, "guidance": 1.0, "shift": 3.0}
    assert not np.array_equal(audio[0.0], audio[1.0])

    without = sample(sample_config(checkpoints, tmp_path / "base", keyscale="A minor", timesignature="4"), null)
    assert np.array_equal(soundfile.read(without[0], dtype="float32")[0], audio[0.0])
    again = sample(asked, null)
    assert [file.name for file in again] == [f"a-b-song-b-seed42-2-strength{s}.flac" for s in ("0", "0.5", "1")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, again, strict=True))


def test_guidance_typed_for_turbo_is_said_to_have_no_effect(checkpoints, tmp_path):
    events: list[Event] = []
    sample(sample_config(checkpoints, tmp_path, guidance=7.0), events.append)
    steps, guidance = [e.message for e in events if isinstance(e, Notice)]
    assert steps.startswith("--steps 2: turbo was distilled for 8 steps")
    assert guidance == "--guidance 7 has no effect: turbo has its guidance built in."


WRONG = [
    ({"strength": (0.5,)}, "--strength: without an adapter"),
    ({"prompt": "  "}, "--prompt: is empty"),
    ({"keyscale": "H minor"}, '--keyscale: "H minor" is no key'),
    ({"timesignature": "5/4"}, "--timesignature:"),
    ({"language": "Klingonish"}, "--language:"),
    ({"lyrics": "la", "lyrics_file": Path("lyrics.txt")}, "both given"),
    ({"lyrics_file": Path("nowhere.txt")}, "--lyrics-file nowhere.txt"),
    ({"adapter": Path("nowhere")}, "nowhere"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_a_wrong_call_is_told_what_is_wrong_before_anything_is_loaded(checkpoints, tmp_path, settings, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        sample(sample_config(checkpoints, tmp_path / "out", **settings), null)
    assert not (tmp_path / "out").exists()


def test_a_lyrics_file_that_is_no_text_is_refused(checkpoints, tmp_path):
    (tmp_path / "lyrics.txt").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"lyrics.txt is in no encoding"):
        sample(sample_config(checkpoints, tmp_path / "out", lyrics_file=tmp_path / "lyrics.txt"), null)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no such files")
def test_lyrics_from_a_pipe_are_refused_and_the_pipe_never_opened(checkpoints, tmp_path):
    pipe = tmp_path / "lyrics.txt"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.open("wb").close(), daemon=True).start()
    with pytest.raises(UserError, match="lyrics.txt is a pipe or a device"):
        sample(sample_config(checkpoints, tmp_path / "out", lyrics_file=pipe), null)
    os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))  # the thread ends


def test_an_adapter_of_another_size_is_refused(checkpoints, tmp_path, adapter_folder):
    with pytest.raises(UserError, match="does not fit this model"):
        sample(sample_config(checkpoints, tmp_path, adapter=adapter_folder, model_variant="xl-turbo"), null)


@pytest.mark.parametrize("words", [["0,0.5,1"], ["0", "0.5", "1"], ["0,", "0.5,1"]])
def test_strengths_take_commas_and_spaces(words, tmp_path):
    call = parse(["sample", "--checkpoint-dir", "x", "--prompt", "p, q", "--strength", *words])
    assert configs_of(call, {})[0].strength == (0.0, 0.5, 1.0)
    assert configs_of(call, {})[0].prompt == "p, q"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "x", "tempo": 3}, r"p.json: \$\[0\].tempo: no such key"),
        ({"caption": ""}, "is empty"),
        ({"prompt": "x", "duration": 0.2}, "duration: 0.2"),
        ({"prompt": "x", "duration": True}, "duration: True"),
        ({"prompt": "x", "seed": 1.5}, "seed: 1.5"),
        ({"prompt": "x", "bpm": 999}, "bpm: a tempo of 999"),
    ],
)
def test_mistakes_in_a_prompt_are_named(values, said):
    with pytest.raises(UserError, match=said):
        prompt_of(values, "p.json: $[0]")


@pytest.mark.parametrize(
    ("text", "name"),
    [("Ωmega, 日本 & co.", "ωmega-日本-co"), ("../..\\x:y", "x-y"), ("!?", "music"), ("é" * 90, "é" * 20)],
)
def test_file_names_come_from_words_alone(text, name):
    assert slug(text) == name


@pytest.mark.slow
@kinds
def test_streamed_blocks_make_the_same_audio(checkpoints, tmp_path, monkeypatch, adapter_type, settings):
    swaps = []
    monkeypatch.setattr("sidestep.tasks.sample.BlockSwap", lambda *args: swaps.append(BlockSwap(*args)))
    folder, asked = tmp_path / "final", config(adapter_type=adapter_type, **settings)
    save_final(trained(decoder(), adapter_type=adapter_type, **settings), folder, asked)
    plain = sample(sample_config(checkpoints, tmp_path / "plain", adapter=folder), null)
    streamed = sample(sample_config(checkpoints, tmp_path / "streamed", adapter=folder, swap_blocks=2), null)
    assert [a.read_bytes() for a in plain] == [b.read_bytes() for b in streamed]
    assert [len(swap.blocks) for swap in swaps] == [2]


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.15), ("nf4", 0.6)])
@pytest.mark.slow
def test_a_quantised_base_can_be_heard(checkpoints, tmp_path, adapter_folder, precision, error):
    plain, there = (
        np.stack([soundfile.read(path, dtype="float32")[0] for path in sample(asked, null)])
        for asked in (
            sample_config(checkpoints, tmp_path / name, adapter=adapter_folder, base_precision=name)
            for name in ("auto", precision)
        )
    )
    assert 0 < np.linalg.norm(there - plain) < error * np.linalg.norm(plain)
    assert not np.array_equal(there[0], there[1])


def test_quantised_blocks_are_not_streamed(checkpoints, tmp_path):
    with pytest.raises(UserError, match="--swap-blocks 1 with --base-precision int8"):
        sample(sample_config(checkpoints, tmp_path, swap_blocks=1, base_precision="int8"), null)


def test_each_step_of_the_music_is_told_where_it_takes_its_time(checkpoints, tmp_path, monkeypatch):
    """A take of minutes is no silence: the sampler's steps are told as they end."""
    monkeypatch.setattr("sidestep.tasks.sample.LongTask", partial(LongTask, quiet_seconds=0.0))
    monkeypatch.setattr("sidestep.events.time.monotonic", map(float, count()).__next__)  # a second later each time
    monkeypatch.setattr("sidestep.tasks.sample.decode", partial(decode, tile_frames=50))
    told = []
    sample(sample_config(checkpoints, tmp_path, steps=3), told.append)
    steps, frames = (
        [(e.done, e.total) for e in told if isinstance(e, Progress) and e.task == task]
        for task in ("Making music", "Decoding the music")
    )
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert frames == [(0, 128), (50, 128), (100, 128), (128, 128)]


def test_a_take_that_cannot_be_written_is_named_once(tmp_path, monkeypatch):
    def refuse(*_args, **_named):
        raise soundfile.LibsndfileError(2)

    monkeypatch.setattr(soundfile, "write", refuse)
    sampler = SimpleNamespace(sampling=Sampling(steps=8, guidance=1.0), sample_rate=48000)
    with pytest.raises(JobError) as raised:
        write_take(tmp_path / "a.flac", sampler, np.zeros((2, 8), np.float32), PROMPT, {})
    assert raised.value.problem == f"{tmp_path / 'a.flac'}: cannot be written (System error)."
    assert not list(tmp_path.iterdir())
