"""The training record: whole or absent, ours and older tools', never executed."""

import os
import pickle
import random
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.data import records
from sidestep.data.records import (
    Record,
    RecordError,
    find_records,
    index_records,
    load_record,
    read_metadata,
    save_record,
)
from sidestep.events import LongTask


def record(frames: int = 5, tokens: int = 7, **more) -> Record:
    return Record(
        torch.randn(frames, 8),
        torch.randn(tokens, 32),
        {"caption": "a 曲", "lyrics": "[00:01.00] la", "bpm": None, "repeat": 2},
        **more,
    )


def legacy(latents, mask, conditions, condition_mask) -> dict:
    return {
        "target_latents": latents,
        "attention_mask": mask,
        "encoder_hidden_states": conditions,
        "encoder_attention_mask": condition_mask,
        "context_latents": torch.cat([torch.zeros_like(latents), torch.ones_like(latents)], -1),
        "metadata": {"caption": "old"},
    }


def test_what_is_saved_comes_back(tmp_path: Path):
    hints = {
        "audio_codes": torch.arange(1, dtype=torch.int32)[:, None],
        "cover_hints": torch.randn(5, 8),
        "hints_encoder_hidden_states": torch.randn(9, 32),
    }
    for saved in (record(), record(**hints)):
        save_record(tmp_path / "deep" / "song.wav.pt", saved)
        back = load_record(tmp_path / "deep" / "song.wav.pt")
        assert back.metadata == saved.metadata == read_metadata(tmp_path / "deep" / "song.wav.pt")
        assert back.has_hints == saved.has_hints
        for name in ("target_latents", "encoder_hidden_states", *(hints if saved.has_hints else ())):
            assert torch.equal(getattr(back, name), getattr(saved, name))


def test_a_record_holds_no_silence_and_no_context_and_no_more_than_its_own_rows(tmp_path: Path):
    whole = torch.randn(10_000, 8)
    save_record(tmp_path / "a.pt", Record(whole[:5], torch.randn(7, 32), {}))
    assert set(torch.load(tmp_path / "a.pt", weights_only=True)) == {
        "target_latents",
        "encoder_hidden_states",
        "metadata",
    }
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_precision_is_kept(tmp_path: Path):
    save_record(tmp_path / "a.pt", Record(torch.randn(5, 8), torch.randn(7, 32, dtype=torch.bfloat16), {}))
    assert load_record(tmp_path / "a.pt").encoder_hidden_states.dtype == torch.bfloat16


@pytest.mark.parametrize("batched", [False, True])
def test_older_tools_records_are_trimmed_by_their_masks(tmp_path: Path, batched: bool):
    latents, conditions = torch.randn(10, 8), torch.randn(769, 32)
    mask, condition_mask = (torch.arange(10) < 6).long(), torch.zeros(769)
    condition_mask[[*range(40), *range(512, 530)]] = 1
    content = legacy(latents, mask, conditions, condition_mask)
    if batched:
        content = {k: v[None] if isinstance(v, torch.Tensor) else v for k, v in content.items()}
    torch.save(content, tmp_path / "old.pt")
    back = load_record(tmp_path / "old.pt")
    assert torch.equal(back.target_latents, latents[:6])
    assert torch.equal(back.encoder_hidden_states, torch.cat([conditions[:40], conditions[512:530]]))
    assert back.metadata == {"caption": "old"}
    assert not back.has_hints


def test_records_in_torchs_old_format_load_too(tmp_path: Path):
    content = legacy(torch.randn(4, 8), torch.ones(4), torch.randn(6, 32), torch.ones(6))
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_record(tmp_path / "old.pt").target_latents, content["target_latents"])


def write_cut(path: Path) -> None:
    save_record(path, record())
    path.write_bytes(path.read_bytes()[:-100])


def write_damaged(path: Path) -> None:
    save_record(path, record())
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("nothing", "")


BAD = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "cut short": write_cut,
    "damaged": write_damaged,
    "text": lambda path: path.write_text("hello"),
    "a lone tensor": lambda path: torch.save(torch.zeros(3), path),
    "another dict": lambda path: torch.save({"latents": torch.zeros(3, 3)}, path),
    "no frames": lambda path: torch.save(
        legacy(torch.randn(4, 8), torch.zeros(4), torch.randn(6, 32), torch.ones(6)), path
    ),
    "mask of another length": lambda path: torch.save(
        legacy(torch.randn(4, 8), torch.ones(5), torch.randn(6, 32), torch.ones(6)), path
    ),
    "flat": lambda path: torch.save(
        {"target_latents": torch.zeros(3), "encoder_hidden_states": torch.zeros(3, 3)}, path
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_record_is_named_and_the_way_out_is_told(tmp_path: Path, kind: str):
    path = tmp_path / "bad.pt"
    BAD[kind](path)
    with pytest.raises(RecordError) as caught:
        load_record(path)
    assert "bad.pt" in caught.value.problem
    assert caught.value.fix


class Attack:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_nothing_in_a_record_is_ever_executed(tmp_path: Path, capfd):
    torch.save({"target_latents": Attack(), "encoder_hidden_states": Attack()}, tmp_path / "evil.pt")
    (tmp_path / "evil2.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(RecordError):
            load_record(tmp_path / name)
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("damage", ["a long name", "no archive's first byte", "a long name in the old format"])
def test_a_damaged_record_is_refused_before_torch_searches_its_text_for_minutes(tmp_path: Path, monkeypatch, damage):
    """`torch.load` runs a quadratic pattern over the message of an unknown global."""
    path = tmp_path / "song.pt"
    save_record(path, record())
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    [pickled] = [name for name in parts if name.endswith("data.pkl")]
    if damage.startswith("a long name"):
        parts[pickled] = b"\x80\x02c" + b"x" * 1_000_000 + b"\ny\n."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    if damage == "a long name in the old format":
        path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + parts[pickled])
    elif damage == "no archive's first byte":
        path.write_bytes(b"c" + path.read_bytes()[1:])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was handed to torch"))
    for read in (load_record, read_metadata):
        with pytest.raises(RecordError, match=r"a text in it has 1,000,0\d\d characters|its first bytes are damaged"):
            read(path)


def test_values_that_are_no_numbers_are_never_saved_and_the_old_record_stays(tmp_path: Path):
    save_record(tmp_path / "a.pt", record())
    before = (tmp_path / "a.pt").read_bytes()
    bad = record()
    bad.target_latents[2, 3] = float("nan")
    with pytest.raises(RecordError, match="target_latents"):
        save_record(tmp_path / "a.pt", bad)
    assert (tmp_path / "a.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_record_and_no_litter(tmp_path: Path, monkeypatch):
    save_record(tmp_path / "a.pt", record())
    before = (tmp_path / "a.pt").read_bytes()

    def break_off(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="No space"):
        save_record(tmp_path / "a.pt", record())
    assert (tmp_path / "a.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_records_are_found_in_order_and_hidden_ones_are_not(tmp_path: Path):
    for name in ("b.pt", "a/z.pt", "a/.hidden.pt", ".pass1/x.pt", "a/notes.txt", "folder.pt/c.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.relative_to(tmp_path).as_posix() for p in find_records(tmp_path)] == ["a/z.pt", "b.pt", "folder.pt/c.pt"]


@settings(deadline=None, max_examples=60)
@given(junk=st.binary(max_size=300))
def test_any_bytes_at_all_are_a_record_or_a_record_error(tmp_path_factory, junk: bytes):
    path = tmp_path_factory.mktemp("junk") / "x.pt"
    path.write_bytes(junk)
    with pytest.raises(RecordError):
        load_record(path)


def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path):
    path = tmp_path / "song.pt"
    save_record(path, Record(torch.randn(200, 8), torch.randn(40, 32), {"caption": "x"}))
    original, draw = path.read_bytes(), random.Random(2)
    with zipfile.ZipFile(path) as archive:
        parts = [
            (info.header_offset + 200, info.file_size - 200) for info in archive.infolist() if info.file_size > 999
        ]
    assert len(parts) == 2
    for start, length in parts * 5:
        damaged = bytearray(original)
        damaged[start + draw.randrange(length)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match="damaged"):
            load_record(path)
    path.write_bytes(original)
    load_record(path)


@pytest.mark.parametrize("where", [0, 30])  # the signature and the name of an entry's own header
def test_an_entry_that_is_not_the_one_listed_is_refused(tmp_path: Path, where: int):
    path = tmp_path / "song.pt"
    save_record(path, record())
    with zipfile.ZipFile(path) as archive:
        start = archive.infolist()[3].header_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + where] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(RecordError, match="damaged"):
        load_record(path)


def test_an_index_is_read_instead_of_records_until_one_changes(tmp_path: Path, monkeypatch):
    hints = {"cover_hints": torch.ones(5, 8), "hints_encoder_hidden_states": torch.ones(9, 32)}
    for name in ("a.pt", "deep/b.pt"):
        save_record(tmp_path / name, record(**hints))
    first, broken = index_records(tmp_path)
    assert not broken
    assert (first["deep/b.pt"].frames, first["deep/b.pt"].tokens) == (5, 7)
    assert set(first["a.pt"].digests) == {"audio", "conditions", "hints"}
    assert first["a.pt"].metadata["repeat"] == 2
    read = []
    monkeypatch.setattr(records, "load_record", lambda path: read.append(path.name) or load_record(path))
    assert index_records(tmp_path) == (first, {})
    assert read == []
    before = load_record(tmp_path / "a.pt")
    save_record(tmp_path / "a.pt", replace(before, cover_hints=before.cover_hints + 1))
    second, _ = index_records(tmp_path)
    assert read == ["a.pt"]
    assert {part for part in second["a.pt"].digests if second["a.pt"].digests[part] != first["a.pt"].digests[part]} == {
        "hints"
    }


def test_reading_many_records_tells_how_far_it_is_and_its_end(tmp_path: Path, monkeypatch):
    for name in ("a.pt", "b.pt", "c.pt"):
        save_record(tmp_path / name, record())
    told = []
    index_records(tmp_path, told.append)
    assert told == []
    monkeypatch.setattr(records, "LongTask", partial(LongTask, quiet_seconds=0))
    index_records(tmp_path, told.append)
    assert [(event.task, event.done, event.total) for event in told] == [("Reading records", n, 3) for n in (0, 3)]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", "a flipped bit"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage):
    save_record(tmp_path / "a.pt", record())
    whole, _ = index_records(tmp_path)
    index = tmp_path / ".records.json"
    index.write_bytes(index.read_bytes().replace(b'"frames": 5', b'"frames": 7') if isinstance(damage, str) else damage)
    assert index_records(tmp_path)[0] == whole


UNUSABLE = {
    "repeat of a billion": {"repeat": 1_000_000_000},
    "repeat of zero": {"repeat": 0},
    "repeat in words": {"repeat": "often"},
    "more than all visits by genre": {"genre_ratio": 101},
    "genre in words": {"genre_ratio": "sometimes"},
    "repeat without end": {"repeat": float("inf")},
    "huge tempo": {"bpm": 10**400},
    "no tempo": {"bpm": float("nan")},
    "half a character": {"caption": "a \ud800"},
    "endless lyrics": {"lyrics": "la " * 50_000},
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_record_of_absurd_words_or_numbers_is_left_out_by_name(tmp_path: Path, kind):
    save_record(tmp_path / "good.pt", record())
    bad = record()
    bad.metadata.update(UNUSABLE[kind])
    save_record(tmp_path / "bad.pt", bad)
    found, broken = index_records(tmp_path)
    assert set(found) == {"good.pt"}
    assert next(iter(UNUSABLE[kind])) in broken["bad.pt"].problem


def test_a_record_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path):
    path = tmp_path / "bomb.pt"
    torch.save(
        {"target_latents": torch.zeros(1, 1).expand(10**9, 64), "encoder_hidden_states": torch.zeros(3, 4)}, path
    )
    with pytest.raises(RecordError, match="larger than the file"):
        load_record(path)
    save_record(path, record())
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(RecordError, match="compressed"):
        load_record(path)


def test_hints_that_do_not_fit_their_song_are_told_before_the_run(tmp_path: Path):
    hints = {"cover_hints": torch.ones(4, 8), "hints_encoder_hidden_states": torch.ones(9, 32)}
    save_record(tmp_path / "a.pt", record(**hints))
    assert "hints do not fit" in index_records(tmp_path)[1]["a.pt"].problem
