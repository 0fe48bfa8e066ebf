"""A file is whole or absent: what is on the disk at each moment of a write, and in which order it gets there."""

import contextlib
import errno
import io
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sidestep import files
from sidestep.files import TEMPORARY, bring_back, host_id, put_in_place, remove, replacing, write_text


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    target = tmp_path / "new" / "deep" / "x.txt"
    with replacing(target) as temporary:
        temporary.write_text("whole", encoding="utf-8")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text(encoding="utf-8") == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["x.txt"]


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    target = tmp_path / "x.txt"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:  # noqa: PT012 (the block is what is tested)
        temporary.write_text("half", encoding="utf-8")
        raise KeyboardInterrupt
    assert target.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    with replacing(target) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert target.read_text(encoding="utf-8") == "old"
    assert target.read_text(encoding="utf-8") == "new"


def test_a_block_that_fails_before_it_writes_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="nothing"), replacing(tmp_path / "x.txt"):
        raise ValueError("nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_name_says_which_process_of_which_machine_writes(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "b") as second:
        for temporary in (first, second):
            match = TEMPORARY.fullmatch(temporary.name)
            assert match
            assert match["host"] == host_id()
            assert int(match["pid"]) == os.getpid()
            temporary.touch()
        assert first != second
        first_name = first.name
    with replacing(tmp_path / "a") as third:
        assert third.name != first_name
        third.touch()


def test_a_machine_has_one_name_and_another_machine_another(monkeypatch):
    mine = host_id()
    assert len(mine) == 8
    assert int(mine, 16) >= 0
    assert host_id() == mine
    host_id.cache_clear()
    assert host_id() == mine
    monkeypatch.setattr(files.socket, "gethostname", lambda: "elsewhere")
    assert host_id() == mine  # it is asked once
    host_id.cache_clear()
    other = host_id()
    assert other != mine

    def missing(path, **kwargs):
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:  # no /proc, as on Windows and macOS: the host's name alone tells
        patch.setattr(files.Path, "stat", missing)
        host_id.cache_clear()
        alone = host_id()
        host_id.cache_clear()
        assert host_id() == alone
    assert alone != other or not Path("/proc/self/ns/pid").exists()
    host_id.cache_clear()


@pytest.mark.skipif(sys.platform != "linux", reason="the path of a descriptor is read from /proc")
def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    steps, fsync, replace, close = [], os.fsync, Path.replace, os.close
    target = tmp_path / "x.txt"

    def flushed(descriptor: int) -> None:
        steps.append(("flush", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(self: Path, to: Path) -> Path:
        steps.append(("rename", to))
        return replace(self, to)

    def closed(descriptor: int) -> None:
        steps.append(("close", Path(f"/proc/self/fd/{descriptor}").readlink()))
        close(descriptor)

    monkeypatch.setattr(files.os, "fsync", flushed)
    monkeypatch.setattr(files.Path, "replace", renamed)
    monkeypatch.setattr(files.os, "close", closed)
    with replacing(target) as temporary:
        temporary.write_bytes(b"x")
    assert steps == [("flush", temporary), ("rename", target), ("flush", tmp_path), ("close", tmp_path)]


def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    fsync, calls = os.fsync, []

    def refuses_the_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("a network file system")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuses_the_second)
    write_text(tmp_path / "x.txt", "whole")
    assert len(calls) == 2
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "whole"
    with pytest.raises(OSError):  # its descriptor was closed
        os.fstat(calls[1])


def test_a_file_that_cannot_be_flushed_is_one(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "x.txt").write_text("old", encoding="utf-8")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def save_by_torch(path: Path) -> None:
    """A disk that fills up inside torch.save: torch then complains of a position, and the system's word is lost."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            if len(data) > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    path.touch()
    torch.save({"a": torch.zeros(1000)}, Full())


def save_by_safetensors(path: Path) -> None:
    path.touch()
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def save_by_hand(path: Path) -> None:
    path.touch()
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("save", [save_by_torch, save_by_safetensors, save_by_hand])
def test_whoever_meets_a_full_disk_the_error_is_the_systems_and_names_the_file(tmp_path, save):
    with pytest.raises(OSError, match="No space left") as stopped, replacing(tmp_path / "x.pt") as temporary:
        save(temporary)
    assert (stopped.value.errno, stopped.value.filename) == (errno.ENOSPC, str(tmp_path / "x.pt"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), SafetensorError("no file of mine"), OSError("nameless")])
def test_an_error_that_is_not_the_systems_stays_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as stopped, replacing(tmp_path / "x.pt"):
        raise error
    assert stopped.value is error


@pytest.mark.parametrize(
    ("platform", "refusals", "tries"), [("win32", 1, 2), ("win32", 9, 10), ("win32", 99, None), ("linux", 1, None)]
)
def test_windows_is_asked_again_while_a_scanner_holds_the_file(platform, refusals, tries, tmp_path, monkeypatch):
    replace, asked, slept = Path.replace, [], []

    def busy(self: Path, to: Path) -> Path:
        asked.append(to)
        if len(asked) <= refusals:
            raise PermissionError(13, "in use")
        return replace(self, to)

    monkeypatch.setattr(files.Path, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    monkeypatch.setattr(files.sys, "platform", platform)
    if tries is None:
        with pytest.raises(PermissionError):
            write_text(tmp_path / "x.txt", "new")
        assert len(asked) == (10 if platform == "win32" else 1)
        assert list(tmp_path.iterdir()) == []
    else:
        write_text(tmp_path / "x.txt", "new")
        assert len(asked) == tries
        assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "new"
    assert slept == pytest.approx([0.05 * (n + 1) for n in range(len(asked) - 1)])


@pytest.mark.parametrize(("platform", "tries"), [("win32", 3), ("linux", 1)])
def test_windows_is_asked_again_to_delete_what_a_scanner_holds(platform, tries, tmp_path, monkeypatch):
    unlink, asked = Path.unlink, []

    def busy(self: Path, **how) -> None:
        asked.append(self)
        if len(asked) < 3:
            raise PermissionError(13, "in use")
        unlink(self, **how)

    (tmp_path / "x").touch()
    monkeypatch.setattr(files.Path, "unlink", busy)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    monkeypatch.setattr(files.sys, "platform", platform)
    with contextlib.nullcontext() if platform == "win32" else pytest.raises(PermissionError):
        remove(tmp_path / "x")
    assert len(asked) == tries
    assert (tmp_path / "x").exists() == (platform == "linux")


def test_windows_flushes_no_folder(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files.sys, "platform", "win32")
    monkeypatch.setattr(files.os, "fsync", flushed.append)
    write_text(tmp_path / "x.txt", "whole")
    assert len(flushed) == 1
    assert (tmp_path / "x.txt").is_file()


def test_text_is_utf_8_with_plain_line_ends(tmp_path):
    write_text(tmp_path / "x.txt", "ä\r\nb\nc")
    assert (tmp_path / "x.txt").read_bytes() == "ä\r\nb\nc".encode()
    write_text(tmp_path / "x.txt", "")
    assert (tmp_path / "x.txt").read_bytes() == b""


class Dies(BaseException):
    """As SIGKILL, but that the test lives on."""


def make(path: Path, kind: str, content: str) -> Path:
    file = path / "inside" / "x" if kind == "folder" else path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return path


def content_of(path: Path) -> str:
    return (path / "inside" / "x" if path.is_dir() else path).read_text(encoding="utf-8")


KINDS = [("file", "file"), ("folder", "folder"), ("file", "folder"), ("folder", "file")]


@pytest.mark.parametrize("in_one_step", [True, False])
@pytest.mark.parametrize(("old", "new"), KINDS)
def test_a_file_or_folder_takes_the_place_of_another_of_any_kind(tmp_path, monkeypatch, old, new, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(files, "_exchange", lambda *_paths: False)
    path, fresh = make(tmp_path / "x", old, "old"), make(tmp_path / "fresh", new, "new")
    put_in_place(fresh, path)
    assert content_of(path) == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    put_in_place(make(tmp_path / "fresh", new, "first"), tmp_path / "not there yet")
    assert content_of(tmp_path / "not there yet") == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["not there yet", "x"]


@pytest.mark.skipif(sys.platform != "linux", reason="the exchange is a call of Linux")
def test_linux_exchanges_two_folders_in_one_step(tmp_path, monkeypatch):
    path, fresh = make(tmp_path / "x", "folder", "old"), make(tmp_path / "fresh", "folder", "new")
    monkeypatch.setattr(files.Path, "replace", lambda *_: pytest.fail("two steps"))
    monkeypatch.setattr(files, "remove", lambda *_: None)
    put_in_place(fresh, path)
    assert (content_of(path), content_of(fresh)) == ("new", "old")


@pytest.mark.parametrize("how", [OSError(5, "broken"), Dies()], ids=["error", "kill"])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("old", "new"), KINDS[1:])
def test_where_a_folder_takes_several_steps_each_may_be_the_last(tmp_path, monkeypatch, old, new, step, how):
    path, fresh = make(tmp_path / "x", old, "old"), make(tmp_path / "fresh", new, "new")
    replace, calls = Path.replace, []

    def fails(self: Path, to: Path) -> Path:
        calls.append(to)
        if len(calls) == step:
            raise how
        return replace(self, to)

    monkeypatch.setattr(files, "_exchange", lambda *_paths: False)
    monkeypatch.setattr(files.Path, "replace", fails)
    with pytest.raises(type(how)):
        put_in_place(fresh, path)
    monkeypatch.setattr(files.Path, "replace", replace)
    if isinstance(how, OSError) or step == 1:
        assert path.exists()
    bring_back(path)
    assert content_of(path) == "old"
    remove(fresh)
    put_in_place(make(fresh, new, "again"), path)  # leftovers are no obstacle
    assert content_of(path) == "again"


@pytest.mark.parametrize(("platform", "number"), [("win32", 28), ("linux", 112)])
def test_the_number_in_safetensors_text_is_translated_where_it_is_windows_own(tmp_path, monkeypatch, platform, number):
    asked = []

    class SystemError_(OSError):
        def __init__(self, *arguments):
            asked.append(arguments)
            super().__init__(28, "as Windows maps its number")

    monkeypatch.setattr(files.sys, "platform", platform)
    if platform == "win32":
        monkeypatch.setattr(files, "OSError", SystemError_, raising=False)
    assert files._system_error(SafetensorError("I/O error: no room (os error 112)")) == number
    assert asked == [(0, "", None, 112)] * (platform == "win32")


@pytest.mark.skipif(sys.platform != "linux", reason="the call of another system")
def test_two_relative_paths_are_exchanged_and_where_there_is_no_call_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, f"of {name}").touch()
    if not files._exchange(Path("a"), Path("b")):
        pytest.skip("this disk exchanges nothing")
    assert [path.name for path in Path("a").iterdir()] == ["of b"]
    monkeypatch.setattr(files.sys, "platform", "freebsd14")
    assert not files._exchange(Path("a"), Path("b"))
    monkeypatch.setattr(files.sys, "platform", "linux")
    monkeypatch.setitem(files.EXCHANGE, "linux", ("a_call_of_no_library", -100))
    assert not files._exchange(Path("a"), Path("b"))
    assert [path.name for path in Path("a").iterdir()] == ["of b"]
