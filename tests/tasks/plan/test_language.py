"""The memory that the language model's jobs take, by plan: which size trains, listens and composes on which card."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.device import GIB, Choice, GpuMemory, with_overhead
from sidestep.acestep.layout import read_config
from sidestep.acestep.lm.decoding import Sampling
from sidestep.acestep.lm.model import load_language_model
from sidestep.adapters.attach import attach
from sidestep.cli import commands
from sidestep.errors import UserError
from sidestep.events import Decision, Notice, Table
from sidestep.settings.config import BuildDatasetConfig, PlanConfig, TrainLmConfig
from sidestep.tasks.describe.listener import LanguageModelListener
from sidestep.tasks.plan import language
from sidestep.tasks.plan import plan as plans
from sidestep.tasks.plan.language import (
    OFFICIAL_LANGUAGE_MODELS,
    check_description,
    describing_bytes,
    plan_language,
    preview_bytes,
    training_bytes,
    weights_bytes,
    writing_bytes,
)
from sidestep.tasks.plan.passes import codes_bytes, vae_bytes
from sidestep.tasks.plan.step import Peak
from sidestep.variants import CONFIG_2B
from sidestep.words import gib
from tests.tasks.train.test_language import VARIANT

MIB = 2**20
PARAMETERS = {"0.6B": 662_884_352, "1.7B": 1_854_243_840, "4B": 4_189_554_176}
FITS = [  # job, size, base, the smallest card in GiB that it is promised for
    ("train", "0.6B", "auto", 8),
    ("train", "1.7B", "auto", 8),
    ("train", "1.7B", "nf4", 8),
    ("train", "4B", "nf4", 12),
    ("describe", "0.6B", "auto", 8),
    ("describe", "1.7B", "auto", 8),
    ("describe", "4B", "int8", 8),
    ("think", "1.7B", "auto", 8),
    ("think", "4B", "nf4", 8),
    ("think", "4B", "auto", 12),
    ("preview", "0.6B", "auto", 8),
    ("preview", "4B", "nf4", 12),
]


def needed(job: str, size: str, precision: str) -> int:
    """Bytes of a song of 240 s with context and slack."""
    sizes = OFFICIAL_LANGUAGE_MODELS[size]
    if job == "describe":
        return with_overhead(describing_bytes(sizes, CONFIG_2B, precision, torch.bfloat16))
    if job == "think":
        return with_overhead(writing_bytes(sizes, precision, 2224, 2, sides=2))
    nowhere = Path("nowhere")
    config = TrainLmConfig(checkpoint_dir=nowhere, dataset_dir=nowhere, output_dir=nowhere, base_precision=precision)
    if job == "preview":
        return max(preview_bytes(sizes, CONFIG_2B, config, torch.bfloat16))
    return training_bytes(sizes, config, 2224, 2)


@pytest.mark.parametrize(("job", "size", "precision", "gib"), FITS)
def test_each_size_does_its_job_on_the_card_that_it_is_said_to(job, size, precision, gib):
    card = GpuMemory(gib * GIB, "a card")
    assert weights_bytes(OFFICIAL_LANGUAGE_MODELS[size], 2, precision) < needed(job, size, precision) <= card.usable


def test_a_model_that_does_not_fit_is_not_said_to():
    for job in ("train", "describe", "think"):
        assert needed(job, "4B", "auto") > 8 * GIB


@pytest.mark.parametrize("size", OFFICIAL_LANGUAGE_MODELS)
def test_the_sizes_that_are_known_without_files_are_those_of_the_files(size):
    assert weights_bytes(OFFICIAL_LANGUAGE_MODELS[size], 2, "auto") == pytest.approx(2 * PARAMETERS[size], rel=1e-3)


def test_the_parts_beside_it_are_counted_as_they_are(lm_home):
    """The tiny ones, whose weights can be counted."""
    checkpoint = open_checkpoint(lm_home, VARIANT)
    parts = (checkpoint.load_audio_tokenizer(), checkpoint.load_audio_detokenizer())
    held = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert codes_bytes(checkpoint.config, torch.bfloat16) == 2 * held
    assert vae_bytes(torch.float32) == 2 * vae_bytes(torch.bfloat16) > 4 * 100e6
    lm = load_language_model(lm_home / "acestep-5Hz-lm-0.6B", 512)
    matrices = sum(parameter.numel() for parameter in lm.model.parameters() if parameter.ndim == 2)
    assert weights_bytes(lm.model.config.to_dict(), 4, "auto") == 4 * matrices


def test_guidance_keeps_a_second_cache():
    sizes = OFFICIAL_LANGUAGE_MODELS["1.7B"]
    one, two = (writing_bytes(sizes, "auto", 4096, 2, sides) for sides in (1, 2))
    assert two - one == 4096 * 112 * 1024  # 112 KiB a token, lm-facts section 1
    assert Sampling().guidance != 1  # as `sample --think` is planned


def test_a_preview_while_training_keeps_what_is_trained(lm_home, monkeypatch):
    """Writing: the whole model, both caches and what is trained. Playing: the DiT, its work and what is trained."""
    checkpoint = open_checkpoint(lm_home, VARIANT)
    monkeypatch.setattr(language, "preview_peak", lambda _sizes, making, *_: round(making.preview_duration) * MIB)
    monkeypatch.setattr(language, "with_overhead", lambda tensors: tensors)
    sizes = read_config(lm_home / "acestep-5Hz-lm-0.6B" / "config.json")
    nowhere = {"checkpoint_dir": Path(), "dataset_dir": Path(), "output_dir": Path()}
    config = TrainLmConfig(**nowhere, rank=8, preview_duration=20.0)

    def both(**changes) -> tuple[int, int]:
        return preview_bytes(sizes, checkpoint.config, replace(config, **changes), torch.float32)

    model = attach(load_language_model(lm_home / "acestep-5Hz-lm-0.6B", 512).model.model, config)
    adapter = sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    decoder = sum(4 * parameter.numel() for parameter in checkpoint.load_decoder().parameters())
    writing, playing = both()
    assert writing == writing_bytes(sizes, "auto", 1024 + 100, 4, sides=2) + 3 * adapter  # and AdamW's two moments
    assert playing == pytest.approx(decoder + 20 * MIB + 3 * adapter, rel=1e-3)
    assert both(ema_decay=0.9) == (writing + adapter, playing + adapter)
    longer = both(preview_duration=21.0)
    assert longer[0] > writing
    assert longer[1] == playing + MIB
    assert both(base_precision="nf4")[1] < playing
    assert both(base_precision="nf4")[0] < writing


@pytest.fixture
def card(monkeypatch):
    """A card of so many bytes in the place of `--device cuda`."""

    def put(nbytes: int, taken: int = 0) -> None:
        monkeypatch.setattr(language, "choose_device", lambda *_: Choice(torch.device("cuda"), ""))
        monkeypatch.setattr(language, "gpu_memory", lambda _: GpuMemory(nbytes, "a card", taken))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))

    return put


def test_listening_that_cannot_fit_is_refused_before_a_song_is_touched(tmp_path, lm_home, card, monkeypatch):
    monkeypatch.setattr(LanguageModelListener, "__init__", lambda *_: pytest.fail("loaded"))
    config = BuildDatasetConfig(
        input=tmp_path, checkpoint_dir=lm_home, caption="lm", model_variant=VARIANT, base_precision="nf4"
    )
    card(GIB // 4)
    with pytest.raises(UserError, match="a card has .*it would run out of memory") as caught:
        commands.build_dataset(config, lambda _: None)
    assert "--lm 0.6B" in caught.value.fix
    assert "int8" not in caught.value.fix  # it is smaller already
    assert not list(tmp_path.iterdir())
    told = []
    card(8 * GIB)
    check_description(config, told.append)
    assert [event.what for event in told if isinstance(event, Decision)] == ["memory"]
    card(8 * GIB, taken=8 * GIB - 1)
    check_description(replace(config, base_precision="auto"), told.append)
    assert isinstance(told[-1], Notice)
    assert "may run out of memory" in told[-1].message


def test_plan_tells_of_the_language_model_without_files(monkeypatch):
    told = []
    played = {"auto": 17 * GIB, "int8": 10 * GIB, "nf4": 9 * GIB}
    monkeypatch.setattr(language, "preview_bytes", lambda *of: (GIB, played[of[2].base_precision]))
    found = plan_language(PlanConfig(lm="4B", vram=12.0), told.append)
    [table] = [event for event in told if isinstance(event, Table)]
    verdicts = {(job, base): fits for job, base, _, fits in table.rows}
    assert verdicts["train-lm", "nf4"] == "fits"
    assert verdicts["build-dataset --caption lm", "int8"] == "fits"
    heard = "a preview of train-lm"
    assert (verdicts[heard, "nf4"], verdicts[heard, "as it is"]) == ("fits", "no")
    assert found["needed_bytes"]["nf4"][heard] == 9 * GIB
    assert found["needed_bytes"]["nf4"]["train-lm"] == needed("train", "4B", "nf4")
    assert found["needed_bytes"]["int8"]["build-dataset --caption lm"] == needed("describe", "4B", "int8")
    assert (
        plan_language(PlanConfig(lm="4B", json=True, rank=32), told.append)["needed_bytes"]["nf4"]["train-lm"]
        > (found["needed_bytes"]["nf4"]["train-lm"])
    )
    assert len(told) == 1


def test_plan_counts_the_composer_of_a_run_s_previews(monkeypatch):
    for name in ("preview_peak", "first_pass_peak", "second_pass_peak"):  # known to other tests, and slow
        monkeypatch.setattr(plans, name, lambda *_: GIB)
    monkeypatch.setattr(plans.Planner, "peak", lambda *_: Peak(1, 1, 1, 1, 1, 1))
    told = []
    asked = PlanConfig(preview_think=True, base_precision="nf4", rank=8, song_seconds=20.0)
    found = commands.plan(asked, told.append)
    sizes = OFFICIAL_LANGUAGE_MODELS["1.7B"]  # the app's own
    assert found["composing_bytes"] == with_overhead(writing_bytes(sizes, "nf4", 1024 + 150, 2, sides=2))
    rows = dict(next(event for event in told if isinstance(event, Table)).rows)
    assert rows["composing the previews, before it"] == gib(found["composing_bytes"], digits=2)


def test_plan_reads_a_model_that_is_there_and_refuses_one_that_is_not(lm_home, monkeypatch):
    monkeypatch.setattr(language, "preview_peak", lambda *_: MIB)  # known to other tests, and slow
    at = {"checkpoint_dir": lm_home, "model_variant": VARIANT}
    there = plan_language(PlanConfig(lm="0.6B", json=True, **at), lambda _: None)
    assert there["needed_bytes"]["auto"]["train-lm"] < GIB  # the tiny one's
    assert plan_language(PlanConfig(lm="auto", json=True, **at), lambda _: None) == there | {"lm": "auto"}
    with pytest.raises(UserError, match="--lm mine: this language model was not found"):
        plan_language(PlanConfig(lm="mine", **at), lambda _: None)
    with pytest.raises(UserError, match="--lm 7B: its sizes are not known"):
        commands.plan(PlanConfig(lm="7B"), lambda _: None)
