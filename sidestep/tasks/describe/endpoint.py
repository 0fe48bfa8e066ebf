"""A server as a listener: any that speaks OpenAI's chat format with audio input.

The key comes from the environment alone and goes nowhere but into the request's header: errors, events and what is kept
on disk never hold it, and no redirect is followed with it.
"""

import base64
import hashlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import soundfile

from sidestep.audio.io import SAMPLE_RATE, AudioError, probe, stream
from sidestep.errors import JobError, UserError
from sidestep.events import Notice, Report
from sidestep.settings.config import BuildDatasetConfig

KEY_VARIABLE = "SIDE_STEP_API_KEY"
TRIES = 5
LONGEST_WAIT_SECONDS = 60.0
HEARD_SECONDS, LEAST_SECONDS = 240.0, 15.0
LARGEST_ANSWER = 1 << 20
TOO_LARGE = (413, 422)
REFUSED = (401, 403)
AGAIN = (408, 409, 425, 429)
VERSION = 1  # raise it when what is asked changes
QUESTION = (
    "Listen to this music. Answer with one JSON object and nothing else. Keys: "
    '"caption": one or two sentences on style, instruments, mood, voice and production, without names of artists; '
    '"bpm": a whole number; "keyscale": such as "A minor"; "timesignature": "2", "3", "4" or "6"; '
    '"language": the ISO code of the language that is sung, or null when nobody sings{lyrics}. '
    "Use null for what you cannot hear."
)
LYRICS = '; "lyrics": the words that are sung, with [Verse] and [Chorus] on lines of their own'


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to a place that nobody named."""

    def redirect_request(self, *_arguments: Any, **_named: Any) -> None:
        """None: the answer counts as an error."""


class Endpoint:
    """Sends the middle of each song as mp3 and reads the JSON that comes back. wait: how it sleeps."""

    def __init__(self, config: BuildDatasetConfig, report: Report, wait: Callable[[float], None] = time.sleep):
        parts = urlsplit(config.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise UserError(
                "--endpoint: not the URL of a server (http://… or https://…, without a name or password in it).",
                "Such as --endpoint http://localhost:8000/v1",
            )
        path = parts.path.rstrip("/")
        path = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        self._url = parts._replace(path=path, fragment="").geturl()
        self._host = parts.hostname
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if self._key and parts.scheme == "http" and self._host not in ("localhost", "127.0.0.1", "::1"):
            message = f"--endpoint: the key in {KEY_VARIABLE} goes to {self._host} without encryption (http)."
            report(Notice(message=message, level="warning"))
        self._model, self._timeout, self._report, self._wait = (
            config.endpoint_model,
            config.endpoint_timeout,
            report,
            wait,
        )
        self._question = QUESTION.format(lyrics=LYRICS if config.lyrics != "none" else "")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.name = config.endpoint_model
        asked = hashlib.blake2b(f"{self._url} {self._question}".encode(), digest_size=8).hexdigest()
        self.identity = f"{VERSION} {config.endpoint_model} {asked}"
        report(Notice(message=f"Each song is sent to {self._host}; what that costs is counted there, song by song."))

    def describe(self, path: Path) -> dict[str, Any]:
        """The fields of a song. Raises AudioError where this song fails, UserError and JobError where all would."""
        seconds = min(HEARD_SECONDS, max(probe(path).seconds, 0.0) or HEARD_SECONDS)
        is_part = seconds == HEARD_SECONDS
        while True:
            try:
                fields = self._ask(path, mp3(path, seconds))
            except _TooLarge as error:
                seconds, is_part = seconds / 2, True
                if seconds < LEAST_SECONDS:
                    raise AudioError(path, f"{error} even for {2 * seconds:.0f} s of it") from None
                continue
            return {**fields, "parts": 1, **({"heard": f"from {seconds:.0f} s of it"} if is_part else {})}

    def _ask(self, path: Path, audio: bytes) -> dict[str, Any]:
        """The JSON object that the server's model answers with."""
        sound = {"data": base64.b64encode(audio).decode(), "format": "mp3"}
        content = [{"type": "text", "text": self._question}, {"type": "input_audio", "input_audio": sound}]
        body = json.dumps({"model": self._model, "messages": [{"role": "user", "content": content}]}).encode()
        problem = ""
        for attempt in range(TRIES):
            pause = min(2.0**attempt, LONGEST_WAIT_SECONDS)
            try:
                return object_in(self._post(body))
            except urllib.error.HTTPError as error:
                said = self._clean(error.read(2000).decode("utf-8", "replace"))
                problem = f"the server answers {error.code} {error.reason}: {said}"
                if error.code in TOO_LARGE and ("large" in f"{error.reason} {said}".lower() or error.code == 413):
                    raise _TooLarge(problem) from None
                if error.code in REFUSED:
                    raise UserError(
                        f"--endpoint: {problem}", f"Put the server's key into the environment as {KEY_VARIABLE}."
                    ) from None
                if error.code == 404 or 300 <= error.code < 400:
                    fix = "Check --endpoint (it ends in /v1 for most servers) and --model."
                    raise UserError(f"--endpoint {self._url}: {problem}", fix) from None
                if error.code < 500 and error.code not in AGAIN:
                    raise AudioError(path, problem) from None
                pause = min(retry_after(error.headers.get("Retry-After")) or pause, LONGEST_WAIT_SECONDS)
            except _NotJson as error:
                problem = f"the server's model gives no JSON object: {self._clean(str(error))}"
                if attempt:  # it was asked twice
                    raise AudioError(path, problem) from None
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem = f"no answer from {self._host} ({self._clean(str(reason)) or type(reason).__name__})"
            if attempt + 1 < TRIES:
                message = f"{path.name}: {problem}; again in {pause:.0f} s."
                self._report(Notice(message=message, level="warning"))
                self._wait(pause)
        raise JobError(
            f"{path.name}: {problem}, {TRIES} times.",
            "What was described so far is kept; the same command goes on from there.",
        )

    def _post(self, body: bytes) -> str:
        """What the model says. Raises what urllib raises, and _NotJson for another form of answer."""
        headers = {"Content-Type": "application/json", "User-Agent": "side-step"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, body, headers)
        with self._opener.open(request, timeout=self._timeout) as response:
            text = response.read(LARGEST_ANSWER).decode("utf-8", "replace")
        try:
            return str(json.loads(text)["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _NotJson(text[:200]) from None

    def _clean(self, text: str) -> str:
        """A server's words for the user: short, on one line, and without the key, which some of them repeat."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:300]


class _TooLarge(Exception):
    """The server does not take so much audio."""


class _NotJson(Exception):
    """The answer is no JSON object."""


def object_in(text: str) -> dict[str, Any]:
    """The JSON object in a model's words, which may stand in a fence or behind a sentence. Raises _NotJson."""
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1])
    except (ValueError, RecursionError):
        raise _NotJson(text[:200]) from None
    if not isinstance(found, dict):
        raise _NotJson(text[:200])
    return found


def retry_after(header: str | None) -> float:
    """Seconds that a server asks for; 0 where it names none."""
    return float(header) if header and header.strip().isdigit() else 0.0


def mp3(path: Path, seconds: float) -> bytes:
    """The middle of a song, mono. Raises AudioError."""
    begin = max(0.0, (probe(path).seconds - seconds) / 2)
    first, last, position, held = round(begin * SAMPLE_RATE), round((begin + seconds) * SAMPLE_RATE), 0, []
    for piece in stream(path, begin + seconds):
        own = piece[:, max(0, first - position) : max(0, last - position)]
        position += piece.shape[1]
        if own.size:
            held.append(own.mean(axis=0))
    if not held:
        raise AudioError(path, "holds less audio than its header promises")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate(held), SAMPLE_RATE, format="MP3")
    return buffer.getvalue()
