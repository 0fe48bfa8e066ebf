"""A small world for tests of the wizard: checkpoints, songs, tensors, a run; and askers that follow a script."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Event, Notice
from sidestep.settings.config import TrainConfig
from sidestep.settings.option import as_json_values
from sidestep.settings.path_checks import verify
from sidestep.terminal.terminal import as_lines
from sidestep.wizard.questionnaire import NEWS, Prompt
from sidestep.wizard.session import Outside

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"


class World:
    """Folders below `root` that hold what each path question wants."""

    def __init__(self, root: Path):
        self.root = root
        self.songs, self.tensors, self.run, self.adapter = (
            root / "my songs",
            root / "tensors" / "a",
            root / "runs" / "old",
            root / "runs" / "old" / "final",
        )
        for folder in (self.songs, self.tensors, self.run / "checkpoints" / "epoch_0010", self.adapter):
            folder.mkdir(parents=True)
        (self.songs / "one.wav").write_bytes(b"")
        (self.songs / "dataset.json").write_text(
            json.dumps({"metadata": {}, "samples": [{"audio_path": "one.wav"}]}), encoding="utf-8"
        )
        (self.tensors / "one.pt").write_bytes(b"")
        (self.adapter / "adapter_config.json").write_text("{}", encoding="utf-8")
        self.words = root / "words.txt"
        self.words.write_text("la la\n", encoding="utf-8")
        self.foreign = root / "from elsewhere.safetensors"
        self.foreign.write_bytes(b"")
        (self.run / "checkpoints" / "epoch_0010" / "complete.json").write_text(
            '{"position": {"step": 10}, "files": {}}', encoding="utf-8"
        )
        config = TrainConfig(checkpoint_dir=CHECKPOINTS, dataset_dir=self.tensors, output_dir=self.run, rank=8)
        (self.run / "config.json").write_text(json.dumps(as_json_values(config)), encoding="utf-8")

    def outside(self) -> Outside:
        return Outside(check=lambda holds, path: verify(holds, path, self.count_songs), here=self.root)

    def count_songs(self, folder: Path) -> str:
        if not list(folder.glob("*.wav")):
            raise UserError("No audio files in there.")
        return "1 song, 0:10 of music"

    def path_for(self, name: str) -> str:
        """A path that answers the question of that name."""
        return str(
            {
                "checkpoint_dir": CHECKPOINTS,
                "songs": self.songs,
                "input": self.songs,
                "audio_dir": self.songs,
                "dataset_json": self.songs / "dataset.json",
                "preview_prompts": self.songs / "dataset.json",
                "lyrics_file": self.words,
                "dataset_dir": self.tensors,
                "prior_data": self.tensors,
                "output_dir": self.root / "runs" / "new",
                "tensor_output": self.root / "tensors" / "new",
                "adapter": self.adapter,
                "other_adapter": self.foreign,
                "third_adapter": "",
                "init_from": self.adapter,
                "lm_adapter": self.adapter,
                "preview_adapter": self.adapter,
                "base": CHECKPOINTS,
                "run": self.run,
                "run_folder": self.run,
                "folder": self.run,
                "resume_from": self.run / "checkpoints" / "epoch_0010",
            }.get(name, self.root / "other")
        )


class Script:
    """An asker that takes its replies from a table by question name; what is not in it gets the suggestion.

    A list as a reply is used up one by one, the last one staying. `asked` keeps the prompts.
    """

    def __init__(self, replies: dict[str, Any], limit: int = 200):
        self.replies = {name: list(reply) if isinstance(reply, list) else [reply] for name, reply in replies.items()}
        self.asked: list[Prompt] = []
        self.limit = limit

    def __call__(self, prompt: Prompt) -> Any:
        if prompt.news:
            assert prompt.news.wait(240)
            return NEWS
        self.asked.append(prompt)
        assert len(self.asked) < self.limit, (
            f"asked without end: {[p.name for p in self.asked[-10:]]}, last error: {prompt.error}"
        )
        replies = self.replies.get(prompt.name)
        if not replies:
            return prompt.default
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        return reply(prompt) if isinstance(reply, Callable) else reply

    @property
    def names(self) -> list[str]:
        return [prompt.name for prompt in self.asked]


def welcomed(home: Path, **values: Any) -> None:
    """Make `home` the settings folder of someone who has been here before."""
    os.environ["SIDE_STEP_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    (home / "settings.json").write_text(
        json.dumps({"version": 1, "values": {"welcomed": True, **values}}), encoding="utf-8"
    )


class Screen(list):
    """A `show` that keeps the events."""

    def __call__(self, event: Event) -> None:
        assert not isinstance(event, Notice) or "\n" not in event.message  # it would be shown as \\n
        self.append(event)

    def text(self) -> str:
        return "\n".join(line for event in self for line in as_lines(event))
