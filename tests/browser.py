"""A page in a real browser: what JavaScript finds on it, in frames of any width, by day and by night."""

import json
import queue
import shutil
import subprocess
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")]

# Goes before the page's own script and keeps what goes wrong; what a test asks comes after it and is sent to the test.
WATCH = """<script>
window.wrong = [];
addEventListener('error', e => wrong.push(e.message ?? 'a file could not be loaded'));
addEventListener('unhandledrejection', e => wrong.push(String(e.reason)));
</script>"""
ASK = """<script>
const wait = ms => new Promise(done => setTimeout(done, ms));
(async () => {
  const found = {};
  try { %s } catch (error) { wrong.push(String(error)); }
  found.wrong = wrong; found.hacked = window.hacked ?? null;
  const answer = JSON.stringify([%d, found]);
  fetch('http://127.0.0.1:%d/', {method: 'POST', mode: 'no-cors', body: answer});
})();
</script>"""
FRAME = '<iframe src="asked-%d.html" style="width:%dpx;height:2400px;border:0"></iframe>'
SCHEMES = {"dark": 0, "light": 1}  # as Chromium numbers them


class Answers(BaseHTTPRequestHandler):
    """Receives what a page found."""

    def do_POST(self):
        self.server.answers.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


def in_browser(folder: Path, text: str, question: str, width: int = 1000) -> dict:
    """What `question` (JavaScript that fills `found`) sees of the page, opened from disk in a frame of that width."""
    [found] = in_frames(folder, [(text, width)], question)
    return found


def in_frames(folder: Path, pages: Sequence[tuple[str, int]], question: str, scheme: str = "light") -> list[dict]:
    """The same of several pages at once. pages: (text, width of its frame); scheme: light or dark."""
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        server.answers = queue.Queue()
        Thread(target=server.serve_forever, daemon=True).start()
        for n, (text, _) in enumerate(pages):
            ask = ASK % (question, n, server.server_port)
            (folder / f"asked-{n}.html").write_text(
                text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", ask + "</body>", 1), "utf-8"
            )
        head = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        frames = "".join(FRAME % (n, width) for n, (_, width) in enumerate(pages))
        (folder / "frame.html").write_text(f'{head}<body style="margin:0">{frames}', "utf-8")
        words = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--autoplay-policy=no-user-gesture-required",
            "--remote-debugging-port=0",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        ]
        words += [f"--user-data-dir={folder / 'profile'}", "--window-size=1100,1000", (folder / "frame.html").as_uri()]
        chromium = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            answers = dict(json.loads(server.answers.get(timeout=280)) for _ in pages)
        finally:
            chromium.terminate()
            chromium.wait(30)
            server.shutdown()
    for found in answers.values():
        assert found.pop("wrong") == []
        assert found.pop("hacked") is None
    return [answers[n] for n in range(len(pages))]
