"""What goes wrong gets its message and status, and nothing good is lost."""

import errno
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.adapters import write
from sidestep.cli.main import main
from sidestep.data.records import save_record
from sidestep.errors import ExitStatus, JobError, UserError
from sidestep.events import Decision, FileFailed, Finished, Notice, Saved, StepDone, StepSkipped
from sidestep.settings.option import as_arguments
from sidestep.settings.path_checks import complete_checkpoints
from sidestep.tasks.train import checkpoints as state
from sidestep.tasks.train import loop
from sidestep.tasks.train import songs as songs_module
from sidestep.tasks.train.objective import Objective
from sidestep.tasks.train.setup import train
from tests.training_world import CHECKPOINTS, Log, adapter, record, run, settings, write_data

LATEST = Path("latest")


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data", frames=(30, 30, 40, 30))


def test_a_nan_in_a_tensor_file_leaves_that_song_out_by_name(data, tmp_path):
    poisoned = record(1, 30)
    content = {
        "target_latents": poisoned.target_latents,
        "encoder_hidden_states": poisoned.encoder_hidden_states,
        "metadata": poisoned.metadata,
    }
    content["target_latents"][3, 2] = torch.nan
    torch.save(content, data / "song 1.pt")
    log = run(settings(data, tmp_path / "run", epochs=1))
    (failed,) = log.of(FileFailed)
    assert failed.path == "song 1.pt"
    assert "no numbers" in failed.reason
    assert "3 songs" in log.text
    assert "1 could not be used" in log.text
    assert all(torch.isfinite(t).all() for t in adapter(tmp_path / "run" / "final").values())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.98])
def test_a_truncated_record_is_left_out_by_name(data, tmp_path, share):
    path = data / "song 1.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    log = run(settings(data, tmp_path / "run", epochs=1))
    assert [event.path for event in log.of(FileFailed)] == ["song 1.pt"]


def test_a_record_that_was_left_out_is_in_the_exit_status(data, tmp_path, capsys):
    (data / "song 1.pt").write_bytes(b"nothing")
    config = settings(data, tmp_path / "run", epochs=1)
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.SOME_FAILED
    assert "song 1.pt" in capsys.readouterr().out
    assert adapter(tmp_path / "run" / "final")


def test_when_no_record_can_be_used_the_job_fails(data, tmp_path):
    for path in data.glob("*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(JobError, match="none of its 4 tensor files can be used"):
        run(settings(data, tmp_path / "run"))


def test_an_output_folder_that_cannot_be_written_is_told_before_anything_is_loaded(data, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    log = Log()
    with pytest.raises(UserError, match="--output-dir .* cannot be written") as refused:
        train(settings(data, tmp_path / "file" / "run"), log)
    assert refused.value.status == ExitStatus.USAGE
    assert not log.events
    assert main(["--plain", "fixed", *as_arguments(settings(data, tmp_path / "file" / "run"))]) == ExitStatus.USAGE
    assert "cannot be written" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_the_last_good_state_kept(data, tmp_path, monkeypatch):
    def act(event) -> None:
        if isinstance(event, Saved) and event.what == "checkpoint":
            monkeypatch.setattr(state.torch, "save", full)

    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = torch.save
    config = settings(data, tmp_path / "run", epochs=4, save_every=1)
    with pytest.raises(JobError, match="the disk is full. The last good state is .*epoch_0001") as stopped:
        run(config, act)
    assert "--resume-from latest" in stopped.value.fix
    assert stopped.value.status == ExitStatus.FAILED
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["epoch_0001"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "epoch_0001"
    ]  # what was half written makes room
    monkeypatch.setattr(state.torch, "save", original)
    run(replace(config, resume_from=LATEST))
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize("saves", [2, 4])  # the second of four checkpoints, and final/
def test_a_disk_that_fills_up_under_safetensors_ends_the_run_too(data, tmp_path, monkeypatch, saves):
    """Its error is none of the system's: checkpoints were silently not written, and the run ended with 0."""
    original, count = write.save_file, []

    def save_file(*args, **named) -> None:
        count.append(1)
        if len(count) > saves:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        original(*args, **named)

    monkeypatch.setattr(write, "save_file", save_file)
    config = settings(data, tmp_path / "run", epochs=4, save_every=1, save_best=False)
    with pytest.raises(JobError, match=f"the disk is full. The last good state is .*epoch_000{saves}") as stopped:
        run(config)
    assert "--resume-from latest" in stopped.value.fix


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_the_saves_of_that_time(data, tmp_path, monkeypatch):
    def act(event) -> None:
        if isinstance(event, Saved) and event.path.endswith("epoch_0001"):
            monkeypatch.setattr(state.torch, "save", full)
        if isinstance(event, Notice) and event.level == "error":
            monkeypatch.setattr(state.torch, "save", original)

    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = torch.save
    log = run(settings(data, tmp_path / "run", epochs=4, save_every=1), act)
    told = [event.message for event in log.of(Notice) if event.level == "error"]
    assert len(told) == 1
    assert told[0].startswith("checkpoint: not saved ([Errno 28] No space left on device")
    assert str(tmp_path / "run" / "checkpoints") in told[0]
    kept = [p.name for p in complete_checkpoints(tmp_path / "run")]
    assert kept == ["epoch_0001", "epoch_0003", "epoch_0004"]
    assert log.of(Finished)


@pytest.mark.parametrize("changes", [{}, {"optimizer_type": "adafactor", "ema_decay": 0.9}, {"adapter_type": "lokr"}])
def test_the_room_that_the_saves_will_take_is_told_before_the_first_step(data, tmp_path, changes):
    log = run(settings(data, tmp_path / "run", epochs=3, save_every=1, keep_checkpoints=2, rank=32, **changes))
    (told,) = [event for event in log.of(Decision) if event.what == "disk"]
    assert log.events.index(told) < log.events.index(log.of(StepDone)[0])
    assert told.value.startswith("2 checkpoints of ")
    assert str(tmp_path / "run") in told.reason
    number, unit = told.value.split(" of ")[1].split(",")[0].split()
    said = float(number) * {"KiB": 2**10, "MiB": 2**20}[unit]
    for folder in complete_checkpoints(tmp_path / "run"):
        real = sum(path.stat().st_size for path in folder.iterdir())
        assert said == pytest.approx(real, rel=0.15, abs=100_000)  # headers, history and JSON


def disk_with(free: int):
    return lambda _folder: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


@pytest.mark.slow
def test_a_run_whose_saves_will_not_fit_is_refused_or_told_how_many_do(data, tmp_path, monkeypatch, capsys):
    config = settings(data, tmp_path / "run", epochs=12, save_every=1, keep_checkpoints=0, rank=32)
    monkeypatch.setattr(state.shutil, "disk_usage", disk_with(500_000))
    assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.USAGE
    said = capsys.readouterr().err
    assert "a checkpoint takes" in said
    assert "and only 488 KiB are free" in said
    assert "--rank 16" in said
    assert not (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(state.shutil, "disk_usage", disk_with(5_000_000))
    (warning,) = [e.message for e in run(config).of(Notice) if "will not fit into 5 MiB" in e.message]
    fits = int(warning.split("--keep-checkpoints ")[1].split()[0])
    assert 1 < fits < 12
    fitting = replace(config, keep_checkpoints=fits, output_dir=tmp_path / "fits")
    assert not [e for e in run(fitting).of(Notice) if "will not fit" in e.message]
    each = sum(path.stat().st_size for path in complete_checkpoints(fitting.output_dir)[0].iterdir())
    assert (fits + 1) * each < 5_000_000


@pytest.mark.parametrize("name", ["add_scalar", "flush", "add_histogram_raw", "close"])
def test_curves_that_cannot_be_written_end_with_a_warning_and_not_the_run(data, tmp_path, monkeypatch, name):
    def full(*_args, **_named) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, name, full)
    log = run(settings(data, tmp_path / "run", epochs=2))
    told = [event.message for event in log.of(Notice) if "TensorBoard" in event.message]
    assert told == ["No more curves for TensorBoard in this run (No space left on device)."]
    assert (tmp_path / "run" / "final").is_dir()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_of_events_without_room_costs_a_warning_and_not_the_run(data, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").symlink_to("/dev/full")
    config = settings(data, tmp_path / "run", epochs=1)
    assert main(["--plain", "fixed", *as_arguments(config)]) == 0
    assert capsys.readouterr().out.count("cannot be written now (No space left on device)") == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_really_full_disk_ends_the_command_with_status_1_and_a_run_that_goes_on(data, tmp_path, capsys):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(small)], capture_output=True, check=False
    ).returncode:
        pytest.skip("no right to mount")
    try:
        config = settings(data, small / "run", epochs=30, save_every=1, keep_checkpoints=0, save_best=False)
        assert main(["--plain", "fixed", *as_arguments(config)]) == ExitStatus.FAILED
        said = capsys.readouterr()
        assert "the disk is full" in said.err + said.out
        last = complete_checkpoints(small / "run")[-1]
        elsewhere = tmp_path / "elsewhere"
        run(replace(config, output_dir=elsewhere, resume_from=last, epochs=31))
        assert (elsewhere / "final").is_dir()
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_dataset_file_deleted_in_mid_run_is_not_missed_until_resume(data, tmp_path):
    def act(event) -> None:
        if isinstance(event, StepDone):
            (data / "song 1.pt").unlink(missing_ok=True)

    config = settings(data, tmp_path / "run", epochs=2)
    run(config, act)
    with pytest.raises(UserError, match=r"1 missing \(song 1.pt\)"):
        run(replace(config, epochs=3, resume_from=LATEST))


def test_records_of_another_variant_are_refused(data, tmp_path):
    with pytest.raises(UserError) as refused:
        run(
            settings(
                data,
                tmp_path / "run",
                model_variant="xl-turbo",
                dataset_dir=write_data(
                    tmp_path / "other", checkpoint_identity="of turbo", checkpoint="acestep-v15-turbo"
                ),
            )
        )
    assert (
        "were preprocessed with acestep-v15-turbo, whose condition encoder differs from that of acestep-v15-xl-turbo"
        in refused.value.problem
    )
    assert "train.py preprocess" in refused.value.fix
    same = open_checkpoint(CHECKPOINTS, "turbo").identity("condition_encoder")
    run(settings(write_data(tmp_path / "same", checkpoint_identity=same), tmp_path / "fits", epochs=1))


@pytest.mark.parametrize(("part", "title"), [("vae", "VAE"), ("text_encoder", "text encoder")])
@pytest.mark.parametrize("everywhere", [False, True])
def test_records_of_another_vae_or_text_encoder_are_refused_for_that_part(data, tmp_path, part, title, everywhere):
    def made_by(identity: str) -> dict:
        return {"audio": {"vae": identity, "content": "x"}, "text": {}} if part == "vae" else {"text": {part: identity}}

    own = open_checkpoint(CHECKPOINTS, "turbo").identity(part)
    for number, identity in enumerate(["of another"] * 2 if everywhere else [own, "of another"]):
        save_record(tmp_path / "mixed" / f"{number}.pt", record(number, 30, fingerprint=made_by(identity)))
    with pytest.raises(UserError, match=f"whose {title} differs") as refused:
        run(settings(tmp_path / "mixed", tmp_path / "run"))
    assert f"{2 if everywhere else 1} of 2 songs" in refused.value.problem
    save_record(tmp_path / "own" / "0.pt", record(1, 30, fingerprint=made_by(own)))
    run(settings(tmp_path / "own", tmp_path / "fits", epochs=1))


def test_records_that_name_the_model_in_the_former_way_still_train(tmp_path):
    opened = open_checkpoint(CHECKPOINTS, "turbo")
    assert opened.sampled_identity("vae") != opened.identity("vae")
    for number, identity in enumerate([opened.sampled_identity("vae"), opened.identity("vae")]):
        made = {"audio": {"vae": identity, "content": "x"}, "text": {}}
        save_record(tmp_path / "data" / f"{number}.pt", record(number, 30, fingerprint=made))
    run(settings(tmp_path / "data", tmp_path / "run", epochs=1))


def test_songs_in_place_of_tensors_get_the_command_that_makes_tensors_elsewhere(tmp_path):
    songs = tmp_path / "my songs"
    songs.mkdir()
    (songs / "a.flac").write_bytes(b"any")
    with pytest.raises(UserError, match="these are songs") as refused:
        run(settings(songs, tmp_path / "run"))
    assert f"--audio-dir '{songs}' --tensor-output '{songs}-tensors'" in refused.value.fix
    assert f"--dataset-dir '{songs}-tensors'" in refused.value.fix


def test_a_state_of_another_version_is_refused_and_its_adapter_offered(data, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "STATE_SCHEMA", 1)
    config = settings(data, tmp_path / "run", epochs=2, max_steps=1)
    run(config)
    monkeypatch.undo()
    with pytest.raises(UserError, match="saved by another version") as refused:
        run(replace(config, resume_from=LATEST, max_steps=0))
    saved = complete_checkpoints(config.output_dir)[-1]
    assert f"--init-from {saved}" in refused.value.fix


def test_a_record_that_changes_under_a_run_stops_it_after_a_save(data, tmp_path, monkeypatch):
    monkeypatch.setattr(songs_module, "MEMORY_SHARE", 10**12)  # nothing is kept in memory

    def act(event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            for path in data.glob("*.pt"):
                save_record(path, record(9, 30))

    config = settings(data, tmp_path / "run", epochs=2)
    with pytest.raises(JobError, match="was changed while"):
        run(config, act)
    assert [path.name for path in complete_checkpoints(config.output_dir)] == ["step_000001"]


def test_records_of_other_sizes_are_refused(data, tmp_path):
    narrow = record(1, 30)
    save_record(data / "song 1.pt", replace(narrow, encoder_hidden_states=narrow.encoder_hidden_states[:, :16]))
    with pytest.raises(UserError, match="song 1.pt was made for another model"):
        run(settings(data, tmp_path / "run"))


def test_a_step_that_is_no_number_is_skipped_and_its_song_named(data, tmp_path):
    wild = record(1, 30)
    save_record(
        data / "song 1.pt", replace(wild, target_latents=wild.target_latents * 1e30)
    )  # finite, but not its loss
    config = settings(data, tmp_path / "run", epochs=3)
    log = run(config)
    skipped = log.of(StepSkipped)
    assert len(skipped) == 3
    assert {event.songs for event in skipped} == {("song 1.pt",)}
    assert all(torch.isfinite(t).all() for t in adapter(tmp_path / "run" / "final").values())


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "prodigy"])
def test_a_skipped_step_changes_nothing(data, tmp_path, optimizer):
    """With nothing but poisoned songs the adapter stays the identity that it was."""
    for path in data.glob("*.pt"):
        wild = record(1, 30)
        save_record(path, replace(wild, target_latents=wild.target_latents * 1e30))
    config = settings(data, tmp_path / "run", epochs=1, optimizer_type=optimizer)
    log = run(config)
    assert len(log.of(StepSkipped)) == 2
    tensors = adapter(tmp_path / "run" / "final")
    assert all(not t.any() for name, t in tensors.items() if "lora_B" in name)


def test_ten_bad_steps_in_a_row_stop_the_run_with_the_last_good_state_kept(data, tmp_path, monkeypatch):
    original = Objective.loss

    def broken_later(self, model, batch, noise, t, dropped=None):
        loss = original(self, model, batch, noise, t, dropped)
        return loss * float("nan") if broken else loss

    broken: list[bool] = []

    def act(event) -> None:
        if isinstance(event, Saved) and event.what == "checkpoint":
            broken.append(True)

    monkeypatch.setattr(Objective, "loss", broken_later)
    config = settings(data, tmp_path / "run", epochs=30, save_every=1, keep_checkpoints=1, log_every=1000)
    with pytest.raises(JobError, match="10 optimizer steps in a row"):
        run(config, act)
    assert complete_checkpoints(tmp_path / "run")
    broken.clear()
    monkeypatch.setattr(Objective, "loss", original)
    run(replace(config, resume_from=LATEST, epochs=9))


def test_out_of_memory_names_the_batch_its_length_and_what_helps(data, tmp_path, monkeypatch):
    step = loop.optimizer_step

    def too_much_at_last(run, *args) -> None:
        if run.position.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        step(run, *args)

    monkeypatch.setattr(loop, "optimizer_step", too_much_at_last)
    with pytest.raises(JobError) as stopped:
        run(settings(data, tmp_path / "run", batch_size=2, gradient_accumulation=1, rank=16))
    assert "at optimizer step 2, with a batch of" in stopped.value.problem
    assert "s (song" in stopped.value.problem
    for flag in ("--gradient-checkpointing", "--batch-size 1", "--rank 8"):
        assert flag in stopped.value.fix
    assert [p.name for p in complete_checkpoints(tmp_path / "run")] == ["step_000001"]  # what was learnt is not lost


def test_a_damaged_checkpoint_is_passed_over(data, tmp_path):
    config = settings(data, tmp_path / "run", epochs=3, save_every=1)
    run(config)
    newest = complete_checkpoints(tmp_path / "run")[-1]
    with (newest / state.STATE_FILE).open("rb+") as f:
        f.truncate(1000)
    shutil.rmtree(tmp_path / "run" / "final")
    assert newest not in complete_checkpoints(tmp_path / "run")
    run(replace(config, resume_from=LATEST))


def test_a_number_that_is_none_is_never_saved(data, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "adapter_state", lambda model: {"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(JobError, match="values that are no numbers"):
        run(settings(data, tmp_path / "run", epochs=1))
    assert not (tmp_path / "run" / "final").exists()
    assert not complete_checkpoints(tmp_path / "run")


def test_nothing_in_the_dataset_folder_is_a_wrong_call(tmp_path):
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "no preprocessed .pt tensors")):
        with pytest.raises(UserError, match=words) as refused:
            run(settings(folder, tmp_path / "run"))
        assert refused.value.status == ExitStatus.USAGE
        assert "train.py preprocess" in refused.value.fix
