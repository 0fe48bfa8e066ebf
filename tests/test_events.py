"""Progress of tasks that may be over at once, or take minutes; the file of a run's events."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from sidestep import events
from sidestep.events import EventLog, LongTask, Notice, Progress


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_a_short_task_tells_nothing(clock):
    told: list[Progress] = []
    task = LongTask(told.append, "t", 4)
    for _ in range(4):
        clock.now += 0.7
        task()
    assert told == []


def test_a_long_task_tells_after_three_seconds_then_once_a_second_and_its_end(clock):
    told: list[Progress] = []
    task = LongTask(told.append, "t", 12, unit="bytes")
    for _ in range(12):
        clock.now += 0.4
        task(1, "part")
    assert [event.done for event in told] == [8, 11, 12]
    assert told[0] == Progress(task="t", done=8, total=12, current="part", unit="bytes", eta_seconds=pytest.approx(1.6))
    assert told[-1].eta_seconds == 0


def test_a_task_that_is_known_to_be_long_says_so_at_once(clock):
    told: list[Progress] = []
    task = LongTask(told.append, "t", 2, quiet_seconds=0.0)
    assert told == [Progress(task="t", done=0, total=2)]
    task(2)
    assert [event.done for event in told] == [0, 2]


def test_the_first_thousandth_of_a_task_does_not_say_how_long_the_rest_takes(clock):
    told: list[Progress] = []
    task = LongTask(told.append, "t", 5000, quiet_seconds=0.0)
    for parts in (5, 1):
        clock.now += 4
        task(parts)
    assert [event.eta_seconds for event in told[1:]] == [None, pytest.approx(8 * 4994 / 6)]


def test_events_of_several_threads_stand_in_the_log_once_each(tmp_path, monkeypatch):
    """Keys and signals are answered from threads of their own, while the training tells its steps."""
    log = EventLog(tmp_path / "events.jsonl")
    log(Notice(message="first"))
    file = log._file

    def write(data: bytes) -> int:
        time.sleep(0.001)
        return file.write(data[: len(data) // 2 + 1])

    log._file = SimpleNamespace(write=write, close=file.close)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(log, [Notice(message=str(number)) for number in range(40)]))
    log.close()
    told = [json.loads(line)["message"] for line in (tmp_path / "events.jsonl").read_text("utf-8").splitlines()]
    assert sorted(told) == sorted(["first", *map(str, range(40))])
