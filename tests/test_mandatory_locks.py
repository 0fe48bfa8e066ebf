"""Everything that renames or deletes, under Windows' rule for open files (`tests/mandatory_locks.py`)."""

import gc
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sidestep.cli.main import main
from sidestep.data.records import Record, load_record, read_metadata, save_record
from sidestep.settings import presets
from sidestep.tasks.preprocess.job import LATENTS, WorkFolder
from tests.conftest import FIXTURES, golden_audio
from tests.mandatory_locks import HELD, mandatory_locks  # noqa: F401 (a fixture)


@pytest.mark.usefixtures("mandatory_locks")
def test_the_simulation_refuses_what_windows_refuses(tmp_path):
    path, other = tmp_path / "inside" / "x.safetensors", tmp_path / "other"
    path.parent.mkdir()
    save_file({"a": torch.ones(9)}, path)
    other.write_bytes(b"x")
    attempts = (
        path.unlink,
        lambda: path.rename(tmp_path / "y"),
        lambda: other.replace(path),
        lambda: path.parent.replace(tmp_path / "moved"),
        lambda: shutil.rmtree(path.parent),
    )
    for hold in (lambda: path.open("rb"), lambda: load_file(path), lambda: safe_open(path, "pt")):
        held = hold()
        for attempt in attempts:
            with pytest.raises(PermissionError, match=HELD):
                attempt()
        del held
        gc.collect()
    with pytest.raises(FileExistsError):
        other.rename(path)
    other.replace(path)
    shutil.rmtree(path.parent)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("mandatory_locks")
def test_what_was_read_holds_no_file(tmp_path):
    """While the tensors are in use."""
    work = WorkFolder(tmp_path)
    work.save("song", LATENTS, {"latents": torch.ones(4, 8)}, {"seconds": 4})
    held = work.load("song", LATENTS), work.metadata("song", LATENTS)
    work.drop("song")  # a held file would stay there without a word
    assert not work.keys()
    record, path = Record(torch.ones(9, 4), torch.ones(3, 8), {"caption": "a"}), tmp_path / "song.pt"
    save_record(path, record)
    held += (load_record(path), read_metadata(path))
    save_record(path, record)
    path.unlink()
    assert torch.equal(held[0][0]["latents"], torch.ones(4, 8))
    assert torch.equal(held[2].target_latents, record.target_latents)


def watch(monkeypatch) -> list[int]:
    """The threads that compute each of the decoder's forwards from now on."""
    forward, threads = AceStepTransformer1DModel.forward, []

    def counted(*args, **named):
        threads.append(torch.get_num_threads())
        return forward(*args, **named)

    monkeypatch.setattr(AceStepTransformer1DModel, "forward", counted)
    return threads


@pytest.mark.slow
@pytest.mark.usefixtures("mandatory_locks")
def test_the_demo(tmp_path, capsys, monkeypatch):
    assert main(["--plain", "--yes", "demo", "--output-dir", str(tmp_path / "demo")]) == 0, capsys.readouterr()
    assert main(["--plain", "history", str(tmp_path / "demo")]) == 0
    assert "finished, 20 steps" in capsys.readouterr().out
    judged = watch(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert main(["--plain", "score", str(tmp_path / "demo" / "run")]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert "Recommended: epoch_0020." in capsys.readouterr().out
    assert (tmp_path / "demo" / "run" / "score" / "listen.html").is_file()
    captions, passes, clips = (
        24 * (8 + 1),
        2 * (24 + 32),
        2 * 8 * 8,
    )  # the base's ways, its and the adapter's, the music
    assert len(judged) <= captions + passes + clips  # about 15 s of processor time, half of it libraries
    assert set(judged) == {1}  # thread: two would take as many seconds again to meet


@pytest.mark.slow
@pytest.mark.usefixtures("mandatory_locks")
def test_every_command_twice_over_its_own_results(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SIDE_STEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    songs, checkpoints = tmp_path / "songs", Path(shutil.copytree(FIXTURES / "checkpoints", tmp_path / "checkpoints"))
    songs.mkdir()
    for number in range(3):
        soundfile.write(songs / f"{number}.wav", golden_audio(number, 4.0).T, 48000)
        (songs / f"{number}.txt").write_text("caption: a tone\nlyrics:\n[Verse]\nla", encoding="utf-8")
    base = ("--checkpoint-dir", str(checkpoints))
    one_file = tmp_path / "base.safetensors"
    shutil.copyfile(checkpoints / "acestep-v15-turbo" / "model.safetensors", one_file)
    shutil.copyfile(checkpoints / "acestep-v15-turbo" / "config.json", tmp_path / "base.json")

    def run(*words: object) -> None:
        assert main(["--plain", "--yes", *map(str, words)]) == 0, (words, capsys.readouterr().err[-2000:])
        capsys.readouterr()

    preprocess = ("preprocess", *base, "--dataset-json", songs / "dataset.json", "--tensor-output", "tensors")
    preprocess += ("--regimes", "text2music", "hints")
    run("build-dataset", "--input", songs)
    run("build-dataset", "--input", songs, "--overwrite", "--audit")
    run(*preprocess)
    dataset = songs / "dataset.json"
    dataset.write_text(dataset.read_text(encoding="utf-8").replace("a tone", "a bell"), encoding="utf-8")
    run(*preprocess)  # the conditions anew, out of the old records
    dataset.write_text(dataset.read_text(encoding="utf-8").replace('"repeat": 1', '"repeat": 2'), encoding="utf-8")
    run(*preprocess)  # the metadata alone

    estimate = ("estimate", *base, "--dataset-dir", "tensors", "--rank", 4, "--rank-min", 1, "--batches", 16)
    run(*estimate)
    run(*estimate, "--overwrite")
    train = ("fixed", *base, "--dataset-dir", "tensors", "--output-dir", "run", "--rank", 4, "--save-every", 1)
    train += ("--keep-checkpoints", 2, "--val-split", 0.34, "--chunk-duration", 2, "--ema-decay", 0.5)
    run(*train, "--epochs", 3, "--init", "gradient", "--preview-every", 1, "--preview-duration", 1)
    run(*train, "--epochs", 5, "--init", "gradient", "--resume-from", "latest")
    run("sample", *base, "--adapter", "run/final", "--prompt", "a tone", "--duration", 1, "--output", "samples")

    for form, output in (
        ("peft", "exports/peft"),
        ("comfyui", "exports/c.safetensors"),
        ("comfyui", "exports/comfyui"),
        ("diffusers", "exports/diffusers"),
        ("lycoris", "exports/lycoris"),
    ):
        export = ("export", "run/final", "--format", form, "--output", output)
        run(*export)
        run(*export, "--overwrite", "--add", "run/final:0.5")
    run("export", "run/final", "--format", "peft", "--output", "exports/comfyui", "--overwrite")
    run("export", "run/final", "--format", "merged", "--base", checkpoints, "--output", "exports/merged")
    merged = ("export", "run/final", "--format", "merged", "--base", one_file, "--output", "exports/m.safetensors")
    run(*merged)
    run(*merged, "--overwrite")
    run("inspect", "exports/peft")
    run("sample", *base, "--adapter", "exports/peft", "--prompt", "a tone", "--duration", 1, "--output", "samples")
    run(*train, "--epochs", 1, "--init-from", "exports/peft", "--output-dir", "run2", "--rank", 8)
    run("export", "run/final", "--output", "exports/peft", "--overwrite")
    run("history", "run")

    run("presets", "export", "recommended", "mine.json")
    for overwrite in ((), ("--overwrite",)):
        run("presets", "import", "mine.json", *overwrite)
        run("presets", "export", "recommended", "again.json", *overwrite)
    assert presets.rename("mine", "yours").name == "yours"
    presets.delete("yours")
