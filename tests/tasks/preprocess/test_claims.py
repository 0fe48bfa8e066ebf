"""Songs are held by one living process at a time."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sidestep.files import host_id, replacing, write_text
from sidestep.tasks.preprocess import claims as module
from sidestep.tasks.preprocess.claims import Claims


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_claim(folder: Path, key: str, *, host: str, pid: int, generation: int = 0) -> Path:
    """What a process that was killed leaves behind."""
    owner = f"{host}-{pid}-00000000"
    (folder / "owners").mkdir(parents=True, exist_ok=True)
    (folder / "owners" / owner).write_text(json.dumps({"host": host, "pid": pid, "started": 0.0}))
    path = folder / f"{key}.{generation}.claim"
    path.write_text(owner)
    return path


def test_a_song_is_held_by_one_process(tmp_path: Path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take("a")
        assert first.take("a")
        assert first.holds("a")
        assert not second.take("a")
        assert not second.holds("a")
        first.release("a")
        assert second.take("a")


def test_leaving_gives_everything_back(tmp_path: Path):
    with Claims(tmp_path) as claims:
        claims.take("a")
        claims.take("b")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path):
    with Claims(tmp_path) as outer:
        everyone = [Claims(tmp_path) for _ in range(8)]
        for one in everyone:
            one.__enter__()
        for key in map(str, range(20)):
            if int(key) % 2:  # half of them were a dead process's
                leave_claim(tmp_path, key, host=host_id(), pid=dead_pid() if key == "1" else 2**22 + 1)
            won = []
            start = threading.Barrier(len(everyone))

            def ask(one, key=key, won=won, start=start):
                start.wait()
                if one.take(key):
                    won.append(one)

            threads = [threading.Thread(target=ask, args=(one,)) for one in everyone]
            [t.start() for t in threads]
            [t.join() for t in threads]
            assert len(won) == 1
        for one in everyone:
            one.__exit__(None, None, None)
        assert outer.take("0")


def test_the_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path):
    leave_claim(tmp_path, "a", host=host_id(), pid=dead_pid())
    with Claims(tmp_path) as claims:
        assert claims.take("a")
        assert claims.holds("a")
        claims.release("a")
        assert not list(tmp_path.glob("*.claim"))


def test_a_process_number_that_was_given_anew_is_another_process(tmp_path: Path):
    leave_claim(tmp_path, "a", host=host_id(), pid=os.getpid())  # started at 0: not this one
    with Claims(tmp_path) as claims:
        assert claims.take("a")


@pytest.mark.parametrize(("silent_seconds", "taken"), [(10, False), (1000, True)])
def test_another_machine_is_dead_when_it_was_silent_for_long(tmp_path: Path, silent_seconds: float, taken: bool):
    leave_claim(tmp_path, "a", host="ffffffff", pid=1)
    with Claims(tmp_path) as claims:
        owner = tmp_path / "owners" / "ffffffff-1-00000000"
        os.utime(owner, (claims.started - silent_seconds,) * 2)
        assert claims.take("a") is taken


def test_a_claim_without_a_name_is_left_to_its_writer_for_a_moment(tmp_path: Path):
    (tmp_path / "a.0.claim").write_text("")
    with Claims(tmp_path) as claims:
        assert not claims.take("a")
        os.utime(tmp_path / "a.0.claim", (claims.started - 60,) * 2)
        assert claims.take("a")


def test_one_that_was_taken_for_dead_knows_that_it_lost_its_song(tmp_path: Path):
    with Claims(tmp_path) as slept, Claims(tmp_path) as other:
        slept.take("a")
        owner_file = tmp_path / "owners" / slept.owner
        facts = owner_file.read_text()
        owner_file.unlink()
        assert other.take("a")
        owner_file.write_text(facts)
        assert not slept.holds("a")
        slept.release("a")
        assert other.holds("a")


def test_a_machine_that_wakes_up_is_known_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    with Claims(tmp_path) as slept, Claims(tmp_path) as other:
        slept.take("a")
        (tmp_path / "owners" / slept.owner).unlink()
        for _ in range(200):
            if (tmp_path / "owners" / slept.owner).exists():
                break
            threading.Event().wait(0.02)
        assert not other.take("a")
        assert slept.holds("a")


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path):
    gone, kept = [], []
    for name, list_, age in (
        (f".tmp-{host_id()}-{dead_pid()}-0", gone, 0),
        (f".tmp-{host_id()}-{os.getpid()}-7", kept, 0),
        (".tmp-ffffffff-1-0", kept, 60),
        (".tmp-ffffffff-1-1", gone, 100_000),
        ("song.wav.pt", kept, 100_000),
        (".tmp-notes", kept, 100_000),
    ):
        path = tmp_path / "deep" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        list_.append((path, age))
    with Claims(tmp_path / ".pass1") as claims:
        for path, age in gone + kept:
            os.utime(path, (claims.started - age,) * 2)
        assert claims.clean(tmp_path) == len(gone)
    assert all(path.exists() for path, _ in kept)
    assert not any(path.exists() for path, _ in gone)


def test_resting_processes_are_not_waited_for(tmp_path: Path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.others_working()
        second.rest()
        assert not first.others_working()
        assert second.others_working()


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    with pytest.raises(ValueError, match="stop"), replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
