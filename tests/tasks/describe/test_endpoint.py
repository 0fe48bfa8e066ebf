"""--caption endpoint: a server on loopback that answers, refuses, is slow, busy, broken or too small."""

import base64
import io
import json
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import soundfile

from sidestep.audio.io import AudioError
from sidestep.cli.main import main
from sidestep.data.manifest import read
from sidestep.errors import ExitStatus, JobError, UserError
from sidestep.events import Notice
from sidestep.settings.config import BuildDatasetConfig
from sidestep.tasks.describe import endpoint
from sidestep.tasks.describe.endpoint import KEY_VARIABLE, TRIES, Endpoint, object_in
from tests.song_library import tone, write_sndfile

KEY = "sk-very-secret"
GOOD = {"caption": "a plain tone", "bpm": 90, "keyscale": "A minor", "timesignature": "4", "language": None}


def chat(text: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `answers` (status, body, headers), the last one for ever."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.delay, self.largest = [(200, chat(json.dumps(GOOD)), {})], [], 0.0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.requests.append((self.path, dict(self.headers), json.loads(body)))
        number = min(len(server.requests), len(server.answers)) - 1
        status, content, headers = server.answers[number]
        time.sleep(float(headers.get("Delay", server.delay)))
        if server.largest and len(body) > server.largest:
            status, content, headers = 413, b"audio too large", {}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # the client has left
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def song(tmp_path):
    write_sndfile(tmp_path / "song.wav", tone(300, 2.0), 48_000)
    return tmp_path / "song.wav"


@pytest.fixture
def client(server, song, monkeypatch):
    """(makes a client, what it told, how long it waited)."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    told, waits = [], []

    def make(**more):
        more = {"endpoint": server.url, "endpoint_model": "ears-1", **more}
        settings = BuildDatasetConfig(input=song.parent, caption="endpoint", **more)
        return Endpoint(settings, told.append, waits.append)

    return make, told, waits


def messages(told) -> str:
    return "\n".join(e.message for e in told if isinstance(e, Notice))


def test_a_song_is_sent_as_mp3_and_the_answer_read(server, song, client):
    make, _, _ = client
    assert make().describe(song) == {**GOOD, "parts": 1}
    [(path, headers, body)] = server.requests
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "ears-1")
    text, sound = body["messages"][0]["content"]
    assert "lyrics" not in text["text"]
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])))
    assert (sound["input_audio"]["format"], rate, audio.ndim) == ("mp3", 48_000, 1)
    assert len(audio) / rate == pytest.approx(2.0, abs=0.1)
    make(lyrics="lm").describe(song)
    assert '"lyrics"' in server.requests[1][2]["messages"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("status", "headers", "waited"), [(429, {"Retry-After": "7"}, 7), (429, {}, 1), (500, {}, 1), (503, {}, 1)]
)
def test_a_busy_or_broken_server_is_asked_again(server, song, client, status, headers, waited):
    server.answers = [(status, b"not now", headers), *server.answers]
    make, told, waits = client
    assert make().describe(song)["caption"] == "a plain tone"
    assert waits == [waited]
    assert f"answers {status}" in messages(told)


def test_a_server_that_stays_broken_ends_the_run_and_says_that_nothing_is_lost(server, song, client):
    server.answers = [(500, b"no", {"Retry-After": "9999"})]
    make, _, waits = client
    with pytest.raises(JobError, match=f"500.*{TRIES} times") as caught:
        make().describe(song)
    assert "kept" in caught.value.fix
    assert len(server.requests) == TRIES
    assert waits == [60.0] * (TRIES - 1)


@pytest.mark.parametrize("body", [b"<html>", b'{"choices": []}', b'{"choices": [{"message": 3}]}', b"[" * 5000, b""])
def test_broken_json_of_the_server_costs_the_song_and_not_the_run(server, song, client, body):
    server.answers = [(200, body, {})]
    make, _, _ = client
    with pytest.raises(AudioError, match="no JSON object"):
        make().describe(song)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "text", [json.dumps(GOOD), f"Sure:\n```json\n{json.dumps(GOOD)}\n```", f"{json.dumps(GOOD)} Enjoy."]
)
def test_an_object_is_found_among_words(text):
    assert object_in(text) == GOOD


@pytest.mark.parametrize("text", ["", "no", "[1]", "{", "}{", "{'a': 1}", "{" * 5000 + "}"])
def test_what_is_no_object_is_told(text):
    with pytest.raises(endpoint._NotJson):
        object_in(text)


def test_words_that_are_no_json_are_asked_for_once_more(server, song, client):
    server.answers = [(200, chat("I hear a tone."), {}), *server.answers]
    make, _, _ = client
    assert make().describe(song)["bpm"] == 90


def test_a_slow_server_is_not_waited_for_for_ever(server, song, client):
    server.delay = 5.0
    make, told, _ = client
    with pytest.raises(JobError, match="no answer from 127.0.0.1"):
        make(endpoint_timeout=0.05).describe(song)
    assert "again in" in messages(told)


def test_no_server_at_all_is_told(server, song, client):
    make, _, _ = client
    server.shutdown()
    server.server_close()
    with pytest.raises(JobError, match="no answer"):
        make().describe(song)


def test_too_much_audio_is_halved_until_it_is_taken_and_that_is_said(server, tmp_path, client, monkeypatch):
    monkeypatch.setattr(endpoint, "LEAST_SECONDS", 2.0)
    write_sndfile(tmp_path / "long.wav", tone(300, 8.0), 48_000)
    make, _, _ = client
    make().describe(tmp_path / "long.wav")
    server.largest = len(json.dumps(server.requests[0][2])) // 3
    answer = make().describe(tmp_path / "long.wav")
    assert answer["heard"] == "from 2 s of it"
    server.largest = 100
    with pytest.raises(AudioError, match="413.*even for 2 s"):
        make().describe(tmp_path / "long.wav")


@pytest.mark.parametrize(
    ("status", "named"), [(401, KEY_VARIABLE), (403, KEY_VARIABLE), (404, "--model"), (302, "/v1")]
)
def test_what_no_retry_helps_ends_the_run_with_what_to_do(server, song, client, status, named):
    server.answers = [(status, f"bad key {KEY}".encode(), {"Location": f"{server.url}/elsewhere"})]
    make, _, waits = client
    with pytest.raises(UserError) as caught:
        make().describe(song)
    assert named in caught.value.fix
    assert (len(server.requests), waits) == (1, [])
    assert KEY not in str(caught.value)


def test_a_song_that_the_server_refuses_costs_no_other(server, song, client):
    server.answers = [(400, f"bad audio, {KEY}".encode(), {})]
    make, _, _ = client
    with pytest.raises(AudioError) as caught:
        make().describe(song)
    assert "400" in caught.value.reason
    assert KEY not in caught.value.reason


def test_the_key_is_nowhere_but_in_the_request(server, song, client, monkeypatch, capfd):
    server.answers = [(500, f"your key {KEY} is fine".encode(), {}), *server.answers]
    monkeypatch.setattr("sidestep.tasks.describe.run.Endpoint", partial(Endpoint, wait=lambda _: None))
    folder = song.parent
    typed = ["--caption", "endpoint", "--endpoint", server.url, "--model", "ears-1"]
    assert main(["build-dataset", "--input", str(folder), *typed]) == ExitStatus.OK
    [sample] = read(folder / "dataset.json").samples
    assert (sample.caption, sample.origins["caption"]) == ("a plain tone", "by ears-1")
    assert "Each song is sent to 127.0.0.1" in capfd.readouterr().out
    kept = [path for path in folder.rglob("*") if path.is_file()]
    assert len(kept) >= 3
    assert not any(KEY.encode() in path.read_bytes() for path in kept)


NAMES = [f"song {i}.wav" for i in range(3)]
ANSWERED = (200, chat(json.dumps(GOOD)), {})
WITHOUT_SECOND = [NAMES[0], NAMES[2]]
TROUBLES = {  # what the server does to the second song: which songs are described then, and how the command ends
    "busy": ([(429, b"busy", {}), ANSWERED], NAMES, ExitStatus.OK),
    "broken for a moment": ([(500, b"no", {}), ANSWERED], NAMES, ExitStatus.OK),
    "broken for ever": ([(500, b"no", {})] * TRIES, [], ExitStatus.FAILED),
    "slow for ever": ([(200, b"", {"Delay": "2"})] * TRIES, [], ExitStatus.FAILED),
    "broken JSON": ([(200, b"<html>", {})] * 2 + [ANSWERED], WITHOUT_SECOND, ExitStatus.SOME_FAILED),
    "too large": ([(413, b"too large", {}), ANSWERED], WITHOUT_SECOND, ExitStatus.SOME_FAILED),
    "refused": ([(400, b"no audio", {}), ANSWERED], WITHOUT_SECOND, ExitStatus.SOME_FAILED),
    "without the model": ([(404, b"?", {})], [], ExitStatus.USAGE),
}


@pytest.mark.parametrize(
    "trouble", [pytest.param(name, marks=pytest.mark.slow if "slow" in name else ()) for name in TROUBLES]
)
def test_what_happens_at_one_song_costs_no_other_and_the_same_command_goes_on(server, tmp_path, monkeypatch, trouble):
    answers, described, status = TROUBLES[trouble]
    for i, name in enumerate(NAMES):
        write_sndfile(tmp_path / name, tone(300 + 50 * i, 1.0), 48_000)
    monkeypatch.setattr("sidestep.tasks.describe.run.Endpoint", partial(Endpoint, wait=lambda _: None))
    typed = ["--caption", "endpoint", "--endpoint", server.url, "--model", "ears-1"]
    typed += ["--endpoint-timeout", "1"] if "slow" in trouble else []

    def call() -> tuple[ExitStatus, list[str]]:
        ended = main(["build-dataset", "--input", str(tmp_path), *typed])
        samples = read(tmp_path / "dataset.json").samples
        return ended, [sample.filename for sample in samples if sample.origins["caption"] == "by ears-1"]

    server.answers = [ANSWERED, *answers]
    assert call() == (status, described)
    server.answers, asked = [ANSWERED], len(server.requests)
    assert call() == (ExitStatus.OK, NAMES)
    assert len(server.requests) - asked == len(NAMES) - (len(described) or 1)  # no song is paid for twice


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "http://", "http://me:pw@host/v1"])
def test_what_is_no_server_is_refused(client, url):
    make, _, _ = client
    with pytest.raises(UserError) as caught:
        make(endpoint=url)
    assert "pw" not in str(caught.value).replace("password", "")


def test_a_key_without_encryption_is_warned_of(client):
    make, told, _ = client
    make()
    assert "without encryption" not in messages(told)
    make(endpoint="http://music.example/v1/")
    assert "goes to music.example without encryption" in messages(told)
