"""Windows are told their own length and lyrics; what that takes is encoded once and kept until something changes."""

from pathlib import Path

import pytest
import torch

from sidestep.acestep.checkpoint import open_checkpoint
from sidestep.acestep.conditions import (
    Text,
    TextModels,
    encode_conditions,
    encode_text,
    encode_texts,
    lyric_prompt,
    text_prompt,
    tiled_silence,
    token_ids,
)
from sidestep.acestep.conditions import embed_lyrics as embed
from sidestep.data.records import save_record
from sidestep.errors import JobError, UserError
from sidestep.events import Decision, FileFailed
from sidestep.tasks.train.processes import Processes
from sidestep.tasks.train.songs import load_songs, plan_windows, with_windows
from tests.training_world import CHECKPOINTS, LYRICS, Log, record, run, settings, song, write_data

CPU, FP32 = torch.device("cpu"), torch.float32


class Alone:
    """One process, as accelerate states it."""

    process_index, num_processes = 0, 1


def windowed(data: Path, log: Log | None = None, **changes):
    """The songs of a folder with their windows."""
    config = settings(data, data / "out", **({"chunk_duration": 1.0} | changes))
    checkpoint = open_checkpoint(config.checkpoint_dir, config.model_variant)
    log = log or Log()
    return {
        s.name: s
        for s in with_windows(
            load_songs(config, checkpoint, log), [], config, checkpoint, CPU, FP32, Processes(Alone()), log
        )[0]
    }


def expected(prompt_seconds: float, lyrics: str) -> torch.Tensor:
    """Conditions straight from the two encoders."""
    checkpoint = open_checkpoint(CHECKPOINTS, "turbo")
    model, tokenizer = checkpoint.load_text_encoder()
    prompt = text_prompt("song 1", bpm=100, timesignature="4", keyscale="A minor", duration=prompt_seconds)
    text = encode_text(model, token_ids(tokenizer, prompt, 256)[0])
    words = embed(model, token_ids(tokenizer, lyric_prompt(lyrics, "en"), 2048)[0])
    silence = tiled_silence(checkpoint.silence_latent(), checkpoint.timbre_frames)
    return encode_conditions(checkpoint.load_condition_encoder(), text, words, silence)[0]


@pytest.fixture
def data(tmp_path) -> Path:
    save_record(tmp_path / "plain.pt", record(1, 60))
    save_record(tmp_path / "sung.pt", record(1, 90, lyrics=LYRICS))
    save_record(tmp_path / "short.pt", record(1, 20))
    return tmp_path


def test_a_window_is_told_its_own_length_and_not_the_songs(data):
    plain = windowed(data)["plain.pt"].windows
    assert plain.frames == 25
    assert len(plain.conditions) == 1
    torch.testing.assert_close(plain.conditions[0], expected(1, "[Instrumental]"), atol=1e-6, rtol=0)


def test_lyrics_with_time_marks_follow_the_window(data):
    sung = windowed(data)["sung.pt"].windows
    at = {start: sung.conditions[which] for start, which in zip(sung.starts, sung.which, strict=True)}
    torch.testing.assert_close(at[0], expected(1, "[Verse]\nfirst line"), atol=1e-6, rtol=0)
    torch.testing.assert_close(at[25], expected(1, "[Verse]\nsecond line"), atol=1e-6, rtol=0)
    torch.testing.assert_close(at[65], expected(1, "[Chorus]\nthird line"), atol=1e-6, rtol=0)
    assert len(sung.conditions) < len(sung.starts)  # windows with the same lines share them


def test_a_song_shorter_than_a_window_stays_whole(data):
    assert windowed(data)["short.pt"].windows is None


def test_what_was_encoded_is_kept_and_made_anew_when_it_is_out_of_date(data):
    first, again, changed = Log(), Log(), Log()
    windowed(data, first)
    songs = windowed(data, again)
    assert "Encoding" in first.text
    assert "Encoding" not in again.text
    save_record(data / "plain.pt", record(1, 60, bpm=140))  # another prompt
    different = windowed(data, changed)
    assert "what 1 song or its windows " in changed.text
    assert not torch.equal(different["plain.pt"].windows.conditions[0], songs["plain.pt"].windows.conditions[0])
    kept = data / ".windows" / "25" / "sung.pt"
    content = torch.load(kept, weights_only=True)
    torch.save(content | {"fingerprint": "of another text encoder"}, kept)
    stale = Log()
    windowed(data, stale)
    assert "what 1 song or its windows " in stale.text
    kept.write_bytes(kept.read_bytes()[:100])
    damaged = Log()
    windowed(data, damaged)
    assert "what 1 song or its windows " in damaged.text


def test_a_folder_that_takes_no_files_costs_only_time(data):
    (data / ".windows").write_text("in the way", encoding="utf-8")
    log = Log()
    assert windowed(data, log)["plain.pt"].windows
    assert "kept in memory" in log.text


def test_hints_have_windows_of_their_own(tmp_path):
    save_record(tmp_path / "hinted.pt", record(1, 60, hints=True))
    windows = windowed(tmp_path)["hinted.pt"].windows
    assert len(windows.hints_conditions) == len(windows.conditions)
    assert not torch.equal(windows.hints_conditions[0][-40:], windows.conditions[0][-40:])
    assert all(start % 5 == 0 for start in windows.starts)  # where codes begin


def test_a_record_that_does_not_say_its_prompt_is_left_out_by_name(tmp_path):
    write_data(tmp_path, (60,))
    nameless = record(3, 60)
    del nameless.metadata["caption"]
    save_record(tmp_path / "nameless.pt", nameless)
    log = Log()
    assert set(windowed(tmp_path, log)) == {"song 0.pt"}
    assert [(event.path, "caption" in event.reason) for event in log.of(FileFailed)] == [("nameless.pt", True)]
    (tmp_path / "song 0.pt").unlink()
    with pytest.raises(JobError, match="no record"):
        windowed(tmp_path)


def test_songs_that_share_batches_are_told_the_length_that_is_heard(tmp_path):
    for number, frames in enumerate((300, 298, 284, 271, 150, 149, 60)):
        save_record(tmp_path / f"{number}.pt", record(1, frames, hints=True))
    nameless = record(3, 299)
    del nameless.metadata["caption"]
    save_record(tmp_path / "old.pt", nameless)
    songs = windowed(tmp_path, chunk_duration=0.0, batch_size=4)
    heard = {name: song.windows.frames if song.windows else song.frames for name, song in songs.items()}
    assert heard == {"0.pt": 271, "1.pt": 271, "2.pt": 271, "3.pt": 271, "4.pt": 149, "5.pt": 149, "6.pt": 60} | {
        "old.pt": 299
    }
    cut = songs["0.pt"].windows
    assert all(start % 5 == 0 for start in cut.starts)  # where codes begin
    assert cut.starts[-1] >= 300 - 271 - 5
    torch.testing.assert_close(cut.conditions[0], expected(271 / 25, "[Instrumental]"), atol=1e-6, rtol=0)
    assert songs["3.pt"].windows is None  # the shortest is heard whole, under its own prompt
    assert all(song.windows is None for song in windowed(tmp_path, chunk_duration=0.0).values())


def test_the_batch_that_is_reached_is_said_before_the_run(tmp_path):
    data = write_data(tmp_path / "data", (60, 60, 60, 60, 30))
    log = run(settings(data, tmp_path / "run", batch_size=4, epochs=1))
    (batch,) = [event for event in log.of(Decision) if event.what == "batch"]
    assert batch.value == "2.5 in the mean of --batch-size 4"
    assert "--chunk-duration" in batch.reason
    assert not [
        event for event in run(settings(data, tmp_path / "one", epochs=1)).of(Decision) if event.what == "batch"
    ]


def test_windows_below_a_second_are_refused(data):
    with pytest.raises(UserError, match="--chunk-duration 0.5"):
        windowed(data, chunk_duration=0.5)


def test_long_songs_with_time_marks_have_few_texts():
    lyrics = "\n".join(f"[{s // 60:02d}:{s % 60:02d}.00] line {s}" for s in range(0, 240, 3))
    long = song("long", torch.zeros(6000, 8), torch.zeros(3, 32), metadata={"caption": "x", "lyrics": lyrics})
    plan = plan_windows(long, 750, 25.0, 5, settings(Path(), Path()))
    assert len(plan.texts) <= 30
    assert plan.starts[-1] == 5250


@pytest.mark.parametrize("whole", [True, False])
def test_text_models_that_are_kept_leave_the_device_in_turns(monkeypatch, whole):
    """The device here is `cpu:0`, which tensors share with `cpu`, where the models wait."""
    checkpoint, device, moves = open_checkpoint(CHECKPOINTS, "turbo"), torch.device("cpu:0"), []
    models, texts = TextModels(), [Text("a", "b"), Text("c", "d")]
    first = [made.states for made in encode_texts(checkpoint, texts, device, FP32, models)]
    real = torch.nn.Module.to

    def to(module, *where):
        moves.append((type(module).__name__, str(where[0])))
        return real(module, *where)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    again = encode_texts(checkpoint, texts, device, FP32, models)
    for states in first[: None if whole else 1]:
        assert torch.equal(next(again).states, states)
    again.close()
    text, encoder = "Qwen3Model", "AceStepConditionEncoder"
    assert moves == [(text, "cpu:0"), (text, "cpu"), (encoder, "cpu:0"), (encoder, "cpu")]
