"""train-lm: the same loop on the language model; what it learns, saves, goes on from and refuses."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from sidestep.acestep.device import GIB, GpuMemory
from sidestep.acestep.lm.loss import answer_loss
from sidestep.acestep.lm.prompts import codes_prompt, plan_prompt, plan_text
from sidestep.cli import commands
from sidestep.cli.main import main
from sidestep.data.records import index_records, save_record
from sidestep.errors import ExitStatus, Interrupted, JobError, UserError
from sidestep.events import EpochDone, Finished, Notice, Progress, StepDone, Table, Validated, null
from sidestep.settings.config import HistoryConfig, SampleConfig, TrainLmConfig
from sidestep.settings.option import options_of
from sidestep.tasks.history import history
from sidestep.tasks.plan.language import check_language_memory
from sidestep.tasks.sample import sample
from sidestep.tasks.train import language
from sidestep.tasks.train.language import Language
from sidestep.tasks.train.previews import preview_now
from sidestep.tasks.train.report import previews_in
from sidestep.tasks.train.setup import open_accelerator, train
from tests.acestep.lm.test_model import store
from tests.tasks.train.test_previews import state_of
from tests.training_world import Log, adapter, differing, prepared, record

VARIANT = "acestep-v15-512-codes"


def form(seed: int, seconds: int = 4) -> torch.Tensor:
    """Codes [N, 1] of a song with a form: intro, verse, chorus, verse, each a motif of its own."""
    motif = {"a": [10, 11, 12, 13, 14], "b": [100, 120, 140, 160, 180], "c": [400, 300, 200, 100, 50]}
    codes = [code + seed % 3 for section in "abcb" for code in motif[section]]
    return torch.tensor(codes[: 5 * seconds], dtype=torch.int32)[:, None]


def write_songs(folder: Path, number: int = 4) -> Path:
    for seed in range(number):
        codes = form(seed)
        made = replace(record(seed, 5 * len(codes), hints=True, caption=f"song {seed % 3}"), audio_codes=codes)
        save_record(folder / f"song {seed}.pt", made)
    return folder


def settings(data: Path, output: Path, home: Path, **changes) -> TrainLmConfig:
    values = {
        "checkpoint_dir": home,
        "model_variant": VARIANT,
        "dataset_dir": data,
        "output_dir": output,
        "device": "cpu",
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "lr": 5e-3,
        "epochs": 2,
        "gradient_accumulation": 2,
        "log_every": 1,
        "warmup_steps": 0,
        "val_split": 0.0,
    }
    return TrainLmConfig(**values | changes)


def run(config, act=None) -> Log:
    log = Log(act)
    train(config, log)
    return log


def test_the_loss_of_a_step_is_that_of_the_whole_answer(tmp_path, lm_home, tiny_lm):
    run = prepared(settings(write_songs(tmp_path / "data"), tmp_path / "run", lm_home))
    [micro_batch] = run.objective.grid(run.songs[:1])
    batch = run.objective.collate(run.songs, micro_batch)
    told = {"bpm": 100, "caption": "song 0", "duration": 4, "keyscale": "A minor", "language": "en"}
    plan = plan_text({**told, "timesignature": "4"})
    text = tiny_lm.tokens.text(batch.ids[0])
    assert text.startswith(codes_prompt("song 0", "[Instrumental]", plan) + "<|audio_code_10|>")
    assert text.endswith("<|audio_code_180|><|im_end|>")
    assert tiny_lm.tokens.text(batch.ids[0, : batch.n_prompt]) == plan_prompt("song 0", "[Instrumental]")
    with torch.inference_mode():
        states = tiny_lm.model.model(input_ids=batch.ids).last_hidden_state[0].clone()
    expected = answer_loss(states, tiny_lm.model.lm_head.weight, batch.ids[0], batch.n_prompt)
    torch.testing.assert_close(run.objective.grid_loss(run.wrapped, run.songs, micro_batch)[0].detach(), expected)


def test_loading_the_language_model_is_told(tmp_path, lm_home, monkeypatch):
    monkeypatch.setattr("sidestep.acestep.weights.quiet_seconds", lambda _: 0.0)
    log = run(settings(write_songs(tmp_path / "data"), tmp_path / "run", lm_home, max_steps=1))
    assert "Loading the language model" in {event.task for event in log.of(Progress)}


def test_recomputation_changes_no_gradient(tmp_path, lm_home):
    data = write_songs(tmp_path / "data", 1)
    for name, recompute in (("with", True), ("without", False)):
        run(settings(data, tmp_path / name, lm_home, gradient_checkpointing=recompute, max_steps=2))
    assert not list(differing(adapter(tmp_path / "with" / "final"), adapter(tmp_path / "without" / "final")))


@pytest.mark.slow
def test_form_is_learnt_and_held_out_songs_show_it(tmp_path, lm_home):
    config = settings(
        write_songs(tmp_path / "data", 6),
        tmp_path / "run",
        lm_home,
        epochs=15,
        val_split=0.2,
        lr=1e-2,
        early_stop_patience=0,
    )
    log = run(config)
    losses = [event.loss for event in log.of(Validated)]
    assert losses[-1] < 0.8 * losses[0]
    assert log.of(EpochDone)[-1].loss < log.of(EpochDone)[0].loss
    assert (tmp_path / "run" / "best").is_dir()
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_folder_loads_in_peft_without_our_code(tmp_path, lm_home, tiny_lm):
    run(settings(write_songs(tmp_path / "data"), tmp_path / "run", lm_home))
    final = tmp_path / "run" / "final"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert key in load_file(final / "adapter_model.safetensors")
    base = Qwen3ForCausalLM.from_pretrained(lm_home / "acestep-5Hz-lm-0.6B", dtype=torch.float32)
    ids = torch.tensor([tiny_lm.tokens.ids("<|im_start|>user\nx")])
    with torch.inference_mode():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, final)(ids).logits
    assert (plain - adapted).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["", "bare names in two shards", "with a head of its own"])
def test_a_merged_folder_loads_in_transformers_and_says_the_same(tmp_path, lm_home, tiny_lm, form):
    home = lm_home
    if form:  # as other sizes are stored
        home = tmp_path / "home"
        shutil.copytree(lm_home, home)
        store(home / "acestep-5Hz-lm-0.6B", form)
    run(settings(write_songs(tmp_path / "data"), tmp_path / "run", home))
    final = tmp_path / "run" / "final"
    command = ["export", str(final), "--format", "merged-lm", "--base", str(home), "--model-variant", VARIANT]
    assert main([*command, "--output", str(tmp_path / "waltz"), "--dtype", "fp32"]) == ExitStatus.OK
    merged = tmp_path / "acestep-5Hz-lm-0.6B-waltz"
    names = {path.name for path in (lm_home / "acestep-5Hz-lm-0.6B").iterdir()}
    assert {path.name for path in merged.iterdir()} == names
    keys = [set(load_file(folder / "model.safetensors")) for folder in (merged, lm_home / "acestep-5Hz-lm-0.6B")]
    assert keys[0] == keys[1]  # with `model.`, as transformers writes them and other programs want them
    base = Qwen3ForCausalLM.from_pretrained(lm_home / "acestep-5Hz-lm-0.6B", dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    prompt = codes_prompt("song 0", "[Instrumental]", plan_text({"bpm": 100})) + "<|audio_code_10|>"
    ids = AutoTokenizer.from_pretrained(merged)(prompt, return_tensors="pt").input_ids
    assert ids.tolist() == [tiny_lm.tokens.ids(prompt)]
    with torch.inference_mode():
        plain = base(ids).logits
        expected = PeftModel.from_pretrained(base, final)(ids).logits
        torch.testing.assert_close(whole(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
    assert type(whole) is Qwen3ForCausalLM
    assert whole.config.vocab_size == 1059
    assert main([*command, "--output", str(tmp_path / "waltz")]) != ExitStatus.OK  # it is there already


def test_an_adapter_is_merged_into_the_size_that_it_was_trained_on(tmp_path, lm_home):
    home = tmp_path / "home"
    shutil.copytree(lm_home, home)
    shutil.copytree(home / "acestep-5Hz-lm-0.6B", home / "acestep-5Hz-lm-1.7B")
    run(settings(write_songs(tmp_path / "data", 1), tmp_path / "run", home, lm="0.6B", epochs=1))
    command = ["export", str(tmp_path / "run" / "final"), "--format", "merged-lm", "--base", str(home)]
    assert main([*command, "--model-variant", VARIANT, "--output", str(tmp_path / "mine")]) == ExitStatus.OK
    assert (tmp_path / "acestep-5Hz-lm-0.6B-mine").is_dir()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, lm_home, monkeypatch):
    data = write_songs(tmp_path / "data")
    run(settings(data, tmp_path / "whole", lm_home, dropout=0.1))

    def stop(event):
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = settings(data, tmp_path / "parts", lm_home, dropout=0.1)
    with pytest.raises(Interrupted) as caught:
        run(config, stop)
    assert "train-lm" in str(caught.value)
    events = []
    history(HistoryConfig(folder=tmp_path / "parts"), events.append)
    assert any("train-lm" in command for e in events if isinstance(e, Finished) for command in e.next_commands)
    run(replace(config, resume_from=Path("latest")))
    whole, parts = adapter(tmp_path / "whole" / "final"), adapter(tmp_path / "parts" / "final")
    assert not list(differing(whole, parts))


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_quantised_base_learns_too(tmp_path, lm_home, precision, monkeypatch):
    data, load, asked = write_songs(tmp_path / "data", 2), language.load_language_model, []
    monkeypatch.setattr(language, "load_language_model", lambda *how: asked.append(how[4]) or load(*how))
    log = run(settings(data, tmp_path / "run", lm_home, base_precision=precision, epochs=3))
    losses = [event.loss for event in log.of(EpochDone)]
    assert losses[-1] < losses[0]
    assert asked == [precision]


@pytest.mark.slow
def test_previews_are_what_sample_composes_and_plays_with_the_adapter(tmp_path, lm_home):
    data = write_songs(tmp_path / "data", 1)
    home = tmp_path / "home"
    shutil.copytree(lm_home, home)  # with a DiT that is told captions in a form of its own
    config = home / VARIANT / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"is_lego_sft": True}), encoding="utf-8")
    run(settings(data, tmp_path / "without", lm_home))
    log = run(settings(data, tmp_path / "run", home, preview_every=1, preview_duration=1.0))
    assert not list(differing(adapter(tmp_path / "run" / "final"), adapter(tmp_path / "without" / "final")))
    folder = tmp_path / "run" / "previews"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    places = ("base", "epoch_0001", "epoch_0002")
    assert found == [f"{place}/01-song-0.{kind}" for place in places for kind in ("flac", "json")]
    asked = SampleConfig(
        **{"checkpoint_dir": home, "model_variant": VARIANT, "device": "cpu", "prompt": "song 0", "language": "en"},
        **{"duration": 1.0, "think": True, "strength": (0.0,), "output": tmp_path / "sample"},
    )
    for place, lm_adapter in (("base", None), ("epoch_0002", tmp_path / "run" / "final")):
        [audio] = sample(replace(asked, lm_adapter=lm_adapter), null)
        said, heard = (
            json.loads(path.read_text("utf-8"))
            for path in (audio.with_suffix(".json"), folder / place / "01-song-0.json")
        )
        assert heard["composed"]["codes"] == said["composed"]["codes"]
        assert heard["composed"]["wrote"] == said["composed"]["wrote"]
        assert "bpm" in heard["composed"]["wrote"]  # which the song has, and the composer is not told
        assert (folder / place / "01-song-0.flac").read_bytes() == audio.read_bytes()
    titles = [table.title for table in log.of(Table) if "Composed" in table.title]
    assert titles.count('Composed for "song 0", without the adapter') == 1
    assert titles.count('Composed for "song 0"') == 2
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    wrote = json.loads((folder / "epoch_0001" / "01-song-0.json").read_text("utf-8"))["composed"]["wrote"]
    assert "What the composer wrote" in page
    assert f"bpm {wrote['bpm']} ·" in page


def test_what_was_written_stays_where_it_cannot_be_played(tmp_path, lm_home, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("sidestep.tasks.train.previews.load_model", full)
    trained = prepared(settings(write_songs(tmp_path / "data", 1), tmp_path / "run", lm_home, preview_duration=1.0))
    told = []
    trained.report = told.append
    before = state_of(trained)
    preview_now(trained)  # as the key does it, in a run that was set up without previews
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(trained), strict=True))
    folder = tmp_path / "run" / "previews"
    assert sorted(path.name for path in folder.rglob("*.*")) == ["01-song-0.json"] * 2
    assert [e.message for e in told if isinstance(e, Notice)] == ["No previews this time: no room"]
    [entry] = previews_in(tmp_path / "run")
    assert (entry["base"], entry["takes"]) == (None, [])
    assert [take["label"] for take in entry["written"]] == ["without the adapter", "epoch 0"]
    assert entry["written"][0]["text"].endswith(" · 5 codes")


@pytest.mark.parametrize(
    ("writing", "playing", "said"),
    [
        (7, 9, "The music of a preview needs 9.0 of the 8.0 GiB that are free: there may be none, only what"),
        (9, 7, "Writing a preview needs 9.0 of the 8.0 GiB that are free: there may be none. What"),
        (9, 10, "Writing a preview needs 9.0"),
        (7, 7, None),
    ],
)
def test_the_gate_warns_of_previews_that_will_not_fit(tmp_path, lm_home, monkeypatch, writing, playing, said):
    monkeypatch.setattr("sidestep.tasks.plan.language.gpu_memory", lambda _: GpuMemory(8 * GIB, "a card"))
    monkeypatch.setattr("sidestep.tasks.plan.plan.gpu_memory", lambda _: GpuMemory(8 * GIB, "a card"))
    told, asked = [], []
    monkeypatch.setattr(
        "sidestep.tasks.plan.plan.preview_bytes", lambda *of: asked.append(of) or (writing * GIB, playing * GIB)
    )
    monkeypatch.setattr("sidestep.tasks.train.setup.train", lambda *_: None)
    config = settings(write_songs(tmp_path / "data", 1), tmp_path / "run", lm_home, preview_duration=12.0)
    commands.train_lm(config, told.append)
    assert not [event for event in told if isinstance(event, Notice)]
    assert not asked
    commands.train_lm(replace(config, preview_every=5), told.append)
    warnings = [event.message for event in told if isinstance(event, Notice)]
    assert [message[: len(said or "")] for message in warnings] == ([said] if said else [])
    [(lm, dit, planned, dtype)] = asked
    assert (lm["model_type"], dit["fsq_input_levels"]) == ("qwen3", [8, 8, 8])
    assert (planned.preview_duration, dtype) == (12.0, torch.float32)


@pytest.fixture
def sharded(monkeypatch):
    """What accelerate says in one of two processes under FSDP; its plugin."""
    plugin = SimpleNamespace(transformer_cls_names_to_wrap=None, cpu_ram_efficient_loading=False)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.FSDP,
        is_main_process=False,
        is_fsdp2=True,
        state=SimpleNamespace(fsdp_plugin=plugin),
    )
    monkeypatch.setattr("sidestep.tasks.train.setup.Accelerator", lambda **_: accelerator)
    return plugin


@pytest.mark.parametrize(
    "asked", [{"preview_every": 1}, {"preview_prompt": "techno"}, {"preview_prompts": Path("prompts.json")}]
)
def test_previews_are_refused_where_the_language_model_is_in_pieces(tmp_path, lm_home, sharded, asked):
    config = settings(write_songs(tmp_path / "data", 1), tmp_path / "run", lm_home, **asked)
    with pytest.raises(UserError, match="--preview-every.*under FSDP the language model is in pieces") as caught:
        train(config, null)
    assert "torchrun train.py train-lm" in caught.value.fix
    assert sharded.transformer_cls_names_to_wrap is None


def test_a_layer_of_the_language_model_is_what_its_processes_gather(tmp_path, lm_home, sharded, tiny_lm):
    open_accelerator(settings(tmp_path, tmp_path / "run", lm_home), null)
    assert sharded.transformer_cls_names_to_wrap == [type(tiny_lm.model.model.layers[0]).__name__]


def test_the_key_makes_no_preview_where_the_language_model_is_in_pieces(tmp_path, lm_home, monkeypatch):
    trained = prepared(settings(write_songs(tmp_path / "data", 1), tmp_path / "run", lm_home))
    told = []
    trained.report = told.append
    monkeypatch.setattr(type(trained.accelerator), "is_fsdp2", True)
    preview_now(trained)
    reason = "under FSDP the language model is in pieces, which cannot write."
    assert [event.message for event in told] == [f"No previews this time: {reason}"]
    assert not (tmp_path / "run" / "previews").exists()


def test_songs_without_codes_are_refused_with_the_command_that_makes_them(tmp_path, lm_home):
    save_record(tmp_path / "a.pt", record(0, 50))
    with pytest.raises(UserError, match="1 of 1 songs have no codes") as caught:
        run(settings(tmp_path, tmp_path / "run", lm_home))
    assert "--regimes text2music hints" in caught.value.fix


def test_the_command_trains_and_is_kept_as_it_was_typed(tmp_path, lm_home):
    data = write_songs(tmp_path / "data", 2)
    command = ["train-lm", "--checkpoint-dir", str(lm_home), "--model-variant", VARIANT, "--dataset-dir", str(data)]
    typed = ["--output-dir", str(tmp_path / "run"), "--device", "cpu", "--epochs", "1", "--val-split", "0"]
    assert main([*command, *typed]) == ExitStatus.OK
    assert "train-lm" in (tmp_path / "run" / "command.txt").read_text()
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["lm"] == "auto"
    assert "timestep_mode" not in kept


@pytest.mark.parametrize("forced", [False, True])
def test_a_card_that_is_too_small_is_refused_before_anything_is_loaded(tmp_path, lm_home, monkeypatch, forced):
    card = GpuMemory(2**28, "a small card")
    monkeypatch.setattr("sidestep.tasks.plan.language.gpu_memory", lambda _: card)
    config = settings(tmp_path, tmp_path / "run", lm_home, even_if_it_does_not_fit=forced)
    if forced:
        check_language_memory(config, lambda _: None)
    else:
        with pytest.raises(UserError, match="a small card has .*it would run out of memory"):
            check_language_memory(config, lambda _: None)


def test_the_gate_and_the_training_read_the_index_once(tmp_path, lm_home, monkeypatch):
    data, read = write_songs(tmp_path / "data", 2), []

    def counted(folder, report, *_):
        read.append(folder)
        return index_records(folder, report)

    def enough(*_):
        raise JobError("seen enough")

    monkeypatch.setattr("sidestep.data.records.index_records", counted)
    monkeypatch.setattr("sidestep.tasks.train.songs.index_records", counted)
    monkeypatch.setattr(Language, "usable", enough)
    with pytest.raises(JobError, match="seen enough"):
        commands.train_lm(settings(data, tmp_path / "run", lm_home), lambda _: None)
    assert read == [data]


def test_the_command_has_no_setting_that_the_language_model_would_not_obey():
    """What `train` gets is had by this command too, unless it is fixed: a new one must be thought of here."""
    assert set(options_of(TrainLmConfig)) == {
        "alpha",
        "base_precision",
        "checkpoint_dir",
        "dataset_dir",
        "device",
        "dropout",
        "early_stop_patience",
        "ema_decay",
        "epochs",
        "even_if_it_does_not_fit",
        "gradient_accumulation",
        "gradient_checkpointing",
        "keep_checkpoints",
        "lm",
        "log_every",
        "lr",
        "mark_drop",
        "max_grad_norm",
        "max_steps",
        "model_variant",
        "optimizer_type",
        "output_dir",
        "precision",
        "preview_adapter",
        "preview_duration",
        "preview_every",
        "preview_lyrics",
        "preview_prompt",
        "preview_prompts",
        "preview_seed",
        "rank",
        "resume_from",
        "run_name",
        "save_best",
        "save_best_after",
        "save_every",
        "scheduler_type",
        "seed",
        "target_mlp",
        "target_modules",
        "val_split",
        "validate_every",
        "warmup_steps",
        "weight_decay",
    }
