"""Where records go: every song one of its own, inside the output folder, on every file system."""

import re
import unicodedata
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidestep.data.manifest import relative_path
from sidestep.errors import UserError
from sidestep.events import null
from sidestep.settings.config import PreprocessConfig
from sidestep.tasks.preprocess import songs as songs_module
from sidestep.tasks.preprocess.songs import absolute, key_of, read_songs, record_names


def folded(path: PurePosixPath) -> str:
    return unicodedata.normalize("NFC", path.as_posix()).casefold()


@pytest.mark.parametrize(
    ("names", "records"),
    [
        (["song.wav"], ["song.wav.pt"]),
        (["song.wav", "song.mp3"], ["song.wav.pt", "song.mp3.pt"]),
        (["a/song.wav", "b/song.wav"], ["a/song.wav.pt", "b/song.wav.pt"]),
        (["曲/春 [live].flac"], ["曲/春 [live].flac.pt"]),
    ],
)
def test_records_are_nested_and_named_like_their_songs(names: list[str], records: list[str]):
    assert [p.as_posix() for p in record_names(names)] == records


@pytest.mark.parametrize(
    "names",
    [
        ["Song.wav", "song.wav", "SONG.WAV"],
        ["caf\u00e9.wav", "cafe\u0301.wav"],
        ["a/x.wav", "A/x.wav"],
        ["song.wav", "song.wav"],
        ["x:y.wav", "x_y.wav"],
        ["x?.wav", "x*.wav"],
        ["\udcff.wav", "?.wav", "_.wav"],
        ["con.wav", "_con.wav"],
        ["Song.WAV", "song.wav", "sONG.wav."],
        ["n" * 300 + ".wav", "n" * 301 + ".wav"],
        ["../up/song.wav", "../other/song.wav", "_outside/song.wav", "C:/song.wav", "/abs/song.wav"],
        ["trail. /a.wav", "trail/a.wav"],
    ],
)
def test_songs_that_would_share_a_record_get_one_each(names: list[str]):
    records = record_names(names)
    assert len({folded(p) for p in records}) == len(names)
    assert record_names(names) == records  # the same on every run


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.wav", "/etc/x.wav", "C:\\x.wav", "a/../../x.wav", "\\\\server\\x.wav"]
)
def test_no_path_leaves_the_output_folder(tmp_path: Path, name: str):
    path = absolute(tmp_path / record_names([name])[0])
    assert path.is_relative_to(tmp_path)


@settings(deadline=None, max_examples=100)
@example(["."])  # an entry that names the folder of the songs
@example(["./", "."])
@given(st.lists(st.text(min_size=1, max_size=60).filter(lambda t: "\0" not in t), min_size=1, max_size=6))
def test_any_names_at_all_get_records_that_every_system_takes(names: list[str]):
    records = record_names(names)
    assert len({folded(p) for p in records}) == len(names)
    assert len({key_of(p) for p in records}) == len(names)
    for path in records:
        assert not path.is_absolute()
        assert ".." not in path.parts
        for part in path.parts:
            assert not set('<>:"|?*\\') & set(part)
            assert not part.startswith(".")
            assert part == part.rstrip(" .")
            assert len(part.encode("utf-8", "surrogatepass")) < 240


@pytest.mark.parametrize(
    "title",
    [
        "CON",
        "nul.wav",
        "aux .flac",
        "COM1.mp3",
        "lpt9",
        "com¹.wav",
        "CONIN$",
        "What? 3:15",
        "end.",
        "end ",
        "a<b>|c*",
        '"',
    ],
)
def test_titles_become_names_that_windows_takes_and_tell_them_apart(title: str):
    near = title.strip(" .").lower() + ".wav"
    paths = record_names([f"{title}/{title}", near, "album/" + title])
    assert len({folded(path) for path in paths}) == 3
    for path in paths:
        for part in path.parts:
            assert not re.match(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])[ .]*(\.|$)", part), part
            assert part == part.rstrip(". ")
            assert not set(part) & set('<>:"|?*\\')


@pytest.mark.parametrize(("long_paths", "platform"), [(False, "win32"), (True, "win32"), (False, "linux")])
def test_a_path_that_windows_would_call_not_found_is_refused_by_its_length(
    tmp_path: Path, monkeypatch, capsys, long_paths: bool, platform: str
):
    deep = tmp_path / "songs" / ("album " * 15).strip() / ("disc " * 15).strip()
    deep.mkdir(parents=True)
    (deep / "song.wav").write_bytes(b"no audio")
    touch = Path.touch

    def windows(path: Path, **how) -> None:
        if len(str(path)) > 259 and not long_paths:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        touch(path, **how)

    monkeypatch.setattr(songs_module, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(Path, "touch", windows)
    config = PreprocessConfig(
        checkpoint_dir=tmp_path, audio_dir=tmp_path / "songs", tensor_output=tmp_path / ("t" * 60)
    )
    if long_paths or platform == "linux":
        assert [song.name.rpartition("/")[2] for song in read_songs(config, null)] == ["song.wav"]
    else:
        with pytest.raises(UserError, match=r"--tensor-output .* Windows takes 259") as refused:
            read_songs(config, null)
        assert "LongPathsEnabled" in refused.value.fix


def test_names_are_relative_to_the_base_folder_without_following_links(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    base = tmp_path / "base"
    assert relative_path(base / "link" / "a.wav", base) == "link/a.wav"
    assert relative_path(base / "x" / ".." / "a.wav", base) == "a.wav"
    assert relative_path(tmp_path / "else" / "a.wav", base) == "../else/a.wav"
