"""Songs are held by one process at a time, until it gives them back or ends."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from sidestep.data.records import find_records
from sidestep.errors import UserError
from sidestep.files import host_id, replacing, write_text
from sidestep.settings.path_checks import count_tensors
from sidestep.tasks.preprocess.locks import SongLocks, remove_temporary_files


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


HOLD = """
import sys, time
from pathlib import Path
from sidestep.tasks.preprocess.locks import SongLocks
with SongLocks(Path(sys.argv[1])) as locks:
    for key in sys.argv[2:]:
        assert locks.take(key)
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Start a process that holds songs in the folder; it lives until it is killed or the test ends."""
    running = []

    def start(*keys: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(tmp_path), *keys]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert running[-1].stdout.readline() == "held\n"
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_song_is_held_by_one_process(tmp_path: Path):
    with SongLocks(tmp_path) as first, SongLocks(tmp_path) as second:
        assert first.take("a")
        assert first.take("a")
        assert not second.take("a")
        assert not second.is_free("a")
        first.release("a")
        assert second.is_free("a")
        assert second.take("a")
        assert not first.take("a")


def test_giving_back_what_is_not_held_changes_nothing(tmp_path: Path):
    with SongLocks(tmp_path) as first, SongLocks(tmp_path) as second:
        first.take("a")
        second.release("a")
        assert not second.take("a")


def test_a_song_taken_in_a_thread_is_given_back_by_another(tmp_path: Path):
    with SongLocks(tmp_path) as first, SongLocks(tmp_path) as second:
        thread = threading.Thread(target=first.take, args=("a",))
        thread.start()
        thread.join()
        assert not second.take("a")
        first.release("a")
        assert second.take("a")


def test_leaving_gives_everything_back(tmp_path: Path):
    with SongLocks(tmp_path) as locks:
        locks.take("a")
        locks.take("b")
        locks.release("b")
    assert files(tmp_path) == []


def test_the_last_of_several_removes_all_files(tmp_path: Path):
    with SongLocks(tmp_path) as outer:
        outer.take("a")
        with SongLocks(tmp_path) as inner:
            inner.take("b")
        assert not SongLocks(tmp_path).take("a")
    assert files(tmp_path) == []


def test_of_many_that_ask_at_once_one_gets_it(tmp_path: Path):
    everyone = [SongLocks(tmp_path) for _ in range(8)]
    for key in map(str, range(20)):
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


def take_and_leave(folder: Path, held: Path, rounds: int, failures) -> None:
    """Enter and leave again and again, which removes lock files under everyone's feet; the song is never held twice."""
    for _ in range(rounds):
        with SongLocks(folder) as locks:
            if locks.take("a"):
                try:
                    os.close(os.open(held, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    failures.put("two processes hold one song")
                time.sleep(0.0005)
                held.unlink()


@pytest.mark.slow
def test_removing_lock_files_never_lets_two_processes_in(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    failures = context.Queue()
    arguments = (tmp_path / "locks", tmp_path / "held", 150, failures)
    running = [context.Process(target=take_and_leave, args=arguments) for _ in range(3)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
        assert process.exitcode == 0
    assert failures.empty()
    assert files(tmp_path) == []


@pytest.mark.slow
def test_the_song_of_a_killed_process_is_free_at_once(tmp_path: Path, holder):
    process = holder("a")
    with SongLocks(tmp_path) as locks:
        assert not locks.take("a")
        assert locks.others_at_work()
        process.kill()
        process.wait()
        assert locks.take("a")
        assert not locks.others_at_work()
    assert files(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_stopped_process_keeps_its_song_however_long(tmp_path: Path, holder):
    process = holder("a")
    process.send_signal(signal.SIGSTOP)
    with SongLocks(tmp_path) as locks:
        assert not locks.take("a")
        assert locks.others_at_work()
        process.send_signal(signal.SIGCONT)
        assert not locks.take("a")
        process.send_signal(signal.SIGSTOP)
        process.kill()  # one that is stopped can be killed too
        process.wait()
        assert locks.take("a")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch, number: int):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(UserError, match="cannot be locked"), SongLocks(tmp_path):
        pass


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
        os.utime(path, (time.time() - age,) * 2)
        list_.append(path)
    assert remove_temporary_files(tmp_path) == len(gone)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


@pytest.mark.parametrize("hours", [-30 * 24, -3, 3, 30 * 24])
def test_a_wrong_clock_never_takes_the_file_of_another_machine_at_work(tmp_path: Path, monkeypatch, hours: int):
    fresh, forgotten = tmp_path / ".tmp-ffffffff-1-0", tmp_path / ".tmp-ffffffff-1-1"
    for path, age in ((fresh, 0), (forgotten, 100_000)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    clock = time.time() + hours * 3600
    monkeypatch.setattr(time, "time", lambda: clock)
    remove_temporary_files(tmp_path)
    assert fresh.exists()
    assert not forgotten.exists()


def test_resting_processes_are_not_waited_for(tmp_path: Path):
    with SongLocks(tmp_path) as first, SongLocks(tmp_path) as second:
        assert first.others_at_work()
        second.rest()
        assert not first.others_at_work()
        assert second.others_at_work()


def test_a_file_is_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    with pytest.raises(ValueError, match="stop"), replacing(path) as temporary:  # noqa: PT012 (it is the block that fails)
        temporary.write_text("half")
        raise ValueError("stop")
    assert path.read_text(encoding="utf-8") == "ü\n"
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("reader", [find_records, remove_temporary_files, count_tensors])
def test_a_folder_that_another_process_removes_meanwhile_ends_no_reader(tmp_path: Path, monkeypatch, reader):
    for name in ("a/b/1.pt", "c/2.pt", "3.pt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    scan, gone = os.scandir, tmp_path / "a/b"

    def scandir(path):
        if Path(path) == gone and gone.exists():
            (gone / "1.pt").unlink()
            gone.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = reader(tmp_path)
    assert not gone.exists()
    if reader is find_records:
        assert found == [tmp_path / "3.pt", tmp_path / "c/2.pt"]
