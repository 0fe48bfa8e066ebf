"""Preprocessing that is killed or stopped, and by several processes at once: the same records, nothing done twice."""

import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from sidestep.acestep.vae import encode_mean
from sidestep.audio.io import decode
from sidestep.data.records import INDEX
from sidestep.events import null
from sidestep.files import host_id
from sidestep.tasks.preprocess import first_pass as latents
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.preprocess.locks import remove_temporary_files
from tests.preprocessing import contents, job, make_library

SONGS = [*(f"{i}.wav" for i in range(8)), *(f"deep/{i}.wav" for i in range(4))]
KILLS = 20
ROOT = Path(__file__).parents[3]
CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--mount", "--fork", "--mount-proc")
pytestmark = pytest.mark.slow  # importing torch in one more process takes longest

# One process imports torch; each job is a fork of it, which costs a few hundredths of a second instead of seconds.
processes = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    processes.set_forkserver_preload(["tests.tasks.preprocess.test_processes"])


def digest(audio) -> str:
    return hashlib.blake2b(audio.tobytes(), digest_size=8).hexdigest()


def work(library: Path, output: Path, log: Path, environment: dict[str, str]) -> None:
    """A job in a process of its own.

    The log gets a line for each song encoded, with whether its record was there already, and its summary.
    """
    os.environ.update(environment)
    if "CLOCK" in environment:
        clock, hours = time.time, float(environment["CLOCK"])
        time.time = lambda: clock() + hours * 3600
    if "KILL_AT" in environment:
        left = itertools.count(int(environment["KILL_AT"]), -1)

        def die(event: str, _arguments: tuple) -> None:
            if event in ("os.remove", "os.rename", "os.rmdir") and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
    if "HOST" in environment:
        host_id.cache_clear()
        socket.gethostname = lambda: environment["HOST"]
    names = {digest(decode(library / name)): name for name in SONGS}

    def logging_encode(vae, audio, tile_frames, *more):
        name = names[digest(audio[0].numpy())]
        write("encoded", name, (output / f"{name}.pt").exists())
        time.sleep(0.01)  # wide enough a moment to be hit by a kill
        return encode_mean(vae, audio, tile_frames, *more)

    def write(*words) -> None:
        with log.open("a", encoding="utf-8") as f:
            f.write(json.dumps([os.getpid(), *words]) + "\n")

    latents.encode_mean = logging_encode
    write("started")
    summary = preprocess(job(library, output), null)
    write("summary", summary.done, summary.skipped, summary.failed)


def start(library: Path, output: Path, log: Path, **environment: str):
    process = processes.Process(target=work, args=(library, output, log, environment), daemon=True)
    process.start()
    return process


def lines(log: Path, word: str) -> list[list]:
    read = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    return [[pid, *rest] for pid, what, *rest in read if what == word]


def finish(*running) -> None:
    for process in running:
        process.join(120)
        assert process.exitcode == 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return make_library(tmp_path_factory.mktemp("songs"), SONGS, seconds=0.12)


@pytest.fixture(scope="module")
def reference(library: Path, tmp_path_factory) -> tuple[dict, float]:
    """(what an uninterrupted run makes, the seconds it takes)."""
    folder = tmp_path_factory.mktemp("reference")
    finish(
        start(library, folder / "out", folder / "log")
    )  # the first also starts the process that the others fork from
    began = time.monotonic()
    finish(start(library, folder / "again", folder / "log"))
    return contents(folder / "out"), time.monotonic() - began


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def assert_complete(output: Path, reference: dict) -> None:
    assert contents(output) == reference
    assert files(output) == {f"{name}.pt" for name in SONGS} | {INDEX}  # no temporary file, no lock, no intermediate


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL; terminate() is not as sudden")
def test_killed_at_any_moment_and_started_again_it_makes_what_an_uninterrupted_run_makes(
    library: Path, reference, tmp_path: Path
):
    expected, seconds = reference
    moments = random.Random(20260)
    kills, rounds = 0, 0
    while kills < KILLS:
        rounds += 1
        output, log = tmp_path / f"out{rounds}", tmp_path / f"log{rounds}"
        while True:
            before = len(lines(log, "started"))
            process = start(library, output, log)
            wait_for(lambda log=log, before=before: len(lines(log, "started")) > before)
            process.join(moments.uniform(0.01, seconds * 0.7))
            if process.exitcode is not None or kills == KILLS:
                finish(process)
                break
            process.kill()
            process.join()
            kills += 1
            for path in output.rglob("*.pt"):
                assert path.stat().st_size  # what has its name is whole; contents are compared at the end
        assert_complete(output, expected)
        assert not [line for line in lines(log, "encoded") if line[2]], "encoded although its record was complete"
    print(f"{kills} kills in {rounds} rounds")


def test_two_processes_over_one_folder_make_the_same_set_and_no_song_twice(library: Path, reference, tmp_path: Path):
    both = [start(library, tmp_path / "out", tmp_path / "log") for _ in range(2)]
    finish(*both)
    assert_complete(tmp_path / "out", reference[0])
    assert Counter(name for _, name, _ in lines(tmp_path / "log", "encoded")) == Counter(SONGS)
    summaries = lines(tmp_path / "log", "summary")
    assert sum(done for _, done, _, _ in summaries) == len(SONGS)
    assert all(
        done + skipped == len(SONGS) for _, done, skipped, _ in summaries
    )  # each returns when the whole set is there


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_before_any_rename_or_removal_it_makes_what_an_uninterrupted_run_makes(
    library: Path, reference, tmp_path: Path
):
    output, log, kills = tmp_path / "out", tmp_path / "log", 0
    for number in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):  # each goes on where the one before was killed
        process = start(library, output, log, KILL_AT=str(number))
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
    assert kills >= 6
    finish(*[start(library, output, log) for _ in range(2)])
    assert_complete(output, reference[0])
    assert not [line for line in lines(log, "encoded") if line[2]]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_at_pairs_of_operations_it_makes_what_an_uninterrupted_run_makes(
    library: Path, reference, tmp_path: Path
):
    """A kill between two removals, and then one of the process that cleans up after it: neither leaves a loop."""
    for first, second in itertools.product(range(5), (0, 1)):
        output, log = tmp_path / f"out {first} {second}", tmp_path / f"log {first} {second}"
        for number in (first, second):
            process = start(library, output, log, KILL_AT=str(number))
            process.join(120)
            assert process.exitcode == -signal.SIGKILL
        finish(start(library, output, log))
        assert_complete(output, reference[0])
        assert not [line for line in lines(log, "encoded") if line[2]]


def test_two_containers_make_the_same_set_and_no_song_twice(library: Path, reference, tmp_path: Path):
    """Both processes have the same host name and the number 1: neither takes the other's files for its own."""
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], check=False).returncode:
        pytest.skip("no namespaces here")
    output, log = tmp_path / "out", tmp_path / "log"
    paths = [str(path) for path in (library, output, log)]
    code = f"from pathlib import Path\nfrom {__name__} import work\nwork(*map(Path, {paths!r}), {{}})"
    both = [subprocess.Popen([*CONTAINER, sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_complete(output, reference[0])
    assert Counter(name for _, name, _ in lines(log, "encoded")) == Counter(SONGS)
    assert [pid for pid, *_ in lines(log, "started")] == [1, 1]
    assert sum(done for _, done, _, _ in lines(log, "summary")) == len(SONGS)


WRITE = """
import sys
from pathlib import Path
from sidestep.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    sys.stdin.read()
"""


def test_what_a_container_writes_is_not_taken_for_that_of_a_dead_process_here(tmp_path: Path, monkeypatch):
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], check=False).returncode:
        pytest.skip("no namespaces here")
    command = [*CONTAINER, sys.executable, "-c", WRITE, str(tmp_path / "song.pt")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as container:
        assert container.stdout is not None
        name = container.stdout.readline().strip()

        def no_process(pid: int):  # as most numbers of a container's processes are here
            raise psutil.NoSuchProcess(pid)

        monkeypatch.setattr(psutil, "Process", no_process)
        assert remove_temporary_files(tmp_path) == 0
        assert (tmp_path / name).read_text(encoding="utf-8") == "half"
        container.communicate("")
    assert [path.name for path in tmp_path.iterdir()] == ["song.pt"]


def test_two_machines_with_clocks_three_hours_apart_make_the_same_set_and_no_song_twice(
    library: Path, reference, tmp_path: Path
):
    log = tmp_path / "log"
    finish(*[start(library, tmp_path / "out", log, HOST=host, CLOCK=hours) for host, hours in (("a", "3"), ("b", "0"))])
    assert_complete(tmp_path / "out", reference[0])
    assert Counter(name for _, name, _ in lines(log, "encoded")) == Counter(SONGS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_processs_songs_are_taken_over_by_the_one_that_lives(library: Path, reference, tmp_path: Path):
    log = tmp_path / "log"
    both = [start(library, tmp_path / "out", log) for _ in range(2)]
    wait_for(lambda: {both[0].pid, both[1].pid} <= {pid for pid, *_ in lines(log, "encoded")})
    both[0].kill()
    both[0].join()
    finish(both[1])
    assert_complete(tmp_path / "out", reference[0])
    assert not [line for line in lines(log, "encoded") if line[2]]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_stopped_process_keeps_its_songs_and_the_others_wait_for_it(library: Path, reference, tmp_path: Path):
    log = tmp_path / "log"
    stopped = start(library, tmp_path / "out", log)
    wait_for(lambda: lines(log, "encoded"))
    os.kill(stopped.pid, signal.SIGSTOP)
    other = start(library, tmp_path / "out", log)
    wait_for(lambda: len(files(tmp_path / "out")) > len(SONGS) // 2)
    other.join(3)
    assert other.exitcode is None  # it waits: a stopped process holds songs
    os.kill(stopped.pid, signal.SIGCONT)
    finish(stopped, other)
    assert_complete(tmp_path / "out", reference[0])
    assert Counter(name for _, name, _ in lines(log, "encoded")) == Counter(SONGS)
    summaries = lines(log, "summary")
    assert sum(done for _, done, _, _ in summaries) == len(SONGS)
    assert all(done + skipped == len(SONGS) for _, done, skipped, _ in summaries)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_stopped_process_that_is_killed_is_taken_over_by_the_one_that_waits(library: Path, reference, tmp_path: Path):
    log = tmp_path / "log"
    stopped = start(library, tmp_path / "out", log)
    wait_for(lambda: lines(log, "encoded"))
    os.kill(stopped.pid, signal.SIGSTOP)
    other = start(library, tmp_path / "out", log)
    other.join(3)
    assert other.exitcode is None
    stopped.kill()
    stopped.join()
    finish(other)
    assert_complete(tmp_path / "out", reference[0])
    assert not [line for line in lines(log, "encoded") if line[2]]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_process_that_waits_stops_at_ctrl_c(library: Path, tmp_path: Path):
    log = tmp_path / "log"
    stopped = start(library, tmp_path / "out", log)
    wait_for(lambda: lines(log, "encoded"))
    os.kill(stopped.pid, signal.SIGSTOP)
    other = start(library, tmp_path / "out", log)
    other.join(3)
    assert other.exitcode is None
    os.kill(other.pid, signal.SIGINT)
    other.join(30)
    assert other.exitcode == 1  # Interrupted, which nobody catches here
    stopped.kill()
    stopped.join()


def test_ranks_split_the_songs_and_each_returns_when_all_are_done(library: Path, reference, tmp_path: Path):
    ranks = [
        start(library, tmp_path / "out", tmp_path / "log", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    finish(*ranks)
    assert_complete(tmp_path / "out", reference[0])
    assert Counter(name for _, name, _ in lines(tmp_path / "log", "encoded")) == Counter(SONGS)
    assert sorted(line[1:] for line in lines(tmp_path / "log", "summary")) == [[len(SONGS) // 2, 0, 0]] * 2


def test_the_share_of_a_rank_that_never_came_is_done_by_the_next_run(library: Path, reference, tmp_path: Path):
    finish(start(library, tmp_path / "out", tmp_path / "log", RANK="1", WORLD_SIZE="3"))
    assert len(files(tmp_path / "out") - {INDEX}) == len(SONGS) // 3
    finish(start(library, tmp_path / "out", tmp_path / "log"))
    assert_complete(tmp_path / "out", reference[0])
    assert lines(tmp_path / "log", "summary")[-1][1:] == [len(SONGS) * 2 // 3, len(SONGS) // 3, 0]


def work_plainly(library: Path, output: Path, log: Path, settings: dict) -> None:
    summary = preprocess(job(library, output, **settings), null)
    with log.open("a", encoding="utf-8") as f:
        f.write(json.dumps([os.getpid(), "summary", summary.done, summary.skipped, summary.failed]) + "\n")


def start_plainly(*arguments):
    process = processes.Process(target=work_plainly, args=arguments)
    process.start()
    return process


def test_a_bad_song_is_told_by_every_process(library: Path, tmp_path: Path):
    songs = make_library(tmp_path / "lib", SONGS, seconds=0.12)
    (songs / "3.wav").write_bytes(b"no audio")
    finish(*[start_plainly(songs, tmp_path / "out", tmp_path / "log", {}) for _ in range(2)])
    assert [line[1:][2] for line in lines(tmp_path / "log", "summary")] == [1, 1]
    failures = json.loads((tmp_path / "out" / "failures.json").read_text(encoding="utf-8"))["failures"]
    assert [f["path"] for f in failures] == ["3.wav"]


def test_jobs_with_different_settings_over_one_folder_both_come_to_an_end(library: Path, tmp_path: Path):
    settings = ({"normalize": "none"}, {"normalize": "peak"})
    finish(*[start_plainly(library, tmp_path / "out", tmp_path / "log", changed) for changed in settings])
    summaries = lines(tmp_path / "log", "summary")
    assert len(summaries) == 2
    assert all(sum(counts) == len(SONGS) for _, *counts in summaries)
