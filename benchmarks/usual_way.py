"""How trainers of this model usually run an epoch, rebuilt as the baseline: all that costs time and gives nothing.

The layers of diffusers and peft as they are, conditions padded to 769 tokens, dense masks in the sliding-window layers,
batches of two padded with zeros to the longer song, records with a stored context read anew in worker processes, and
after every micro-step the loss brought to the host and every gradient searched for NaN.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from benchmarks.launches import undo
from benchmarks.measure import Setting
from benchmarks.speed_model import CHANNELS, PADDED_CONDITION, make_model
from sidestep.acestep.attention import use_attention
from sidestep.data.records import load_record
from sidestep.flow_matching.timesteps import turbo_timesteps

WORKERS = 2
SONGS = 4  # of an optimizer step


class PaddedRecords(Dataset):
    """Records on disk as such trainers store them: conditions padded, context included."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return torch.load(self.paths[index], map_location="cpu", weights_only=True)


def store_padded(source: Path, target: Path, condition: int) -> list[Path]:
    """The records of `source` in the usual form, their conditions padded to so many tokens where they are shorter."""
    target.mkdir(parents=True)
    paths = []
    for path in sorted(source.glob("*.pt")):
        record = load_record(path)
        frames, tokens = len(record.target_latents), len(record.encoder_hidden_states)
        padding = max(0, condition - tokens)
        content = {
            "target_latents": record.target_latents,
            "attention_mask": torch.ones(frames),
            "encoder_hidden_states": F.pad(record.encoder_hidden_states, (0, 0, 0, padding)),
            "encoder_attention_mask": F.pad(torch.ones(tokens), (0, padding)),
            "context_latents": torch.zeros(frames, 2 * CHANNELS),
        }
        paths.append(target / path.name)
        torch.save(content, paths[-1])
    return paths


def zero_padded(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch as long as its longest song."""
    longest = max(len(sample["target_latents"]) for sample in samples)

    def pad(x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, (0, 0, 0, longest - len(x))) if x.ndim == 2 else F.pad(x, (0, longest - len(x)))

    by_frame = ("target_latents", "attention_mask", "context_latents")
    return {name: torch.stack([pad(s[name]) if name in by_frame else s[name] for s in samples]) for name in samples[0]}


class UsualTrainer:
    """Model, optimizer and data of the baseline; `epoch()` runs one epoch.

    condition: tokens that conditions are padded to; changes: settings of the run, as of `make_model`.
    """

    def __init__(
        self,
        setting: Setting,
        records: Path,
        folder: Path,
        batch: int = 2,
        condition: int = PADDED_CONDITION,
        **changes: Any,
    ):
        self.device = setting.device
        self.model = make_model(setting, **changes)
        undo(self.model)
        use_attention(self.model, "sdpa")
        if changes.get("gradient_checkpointing"):
            self.model.get_base_model().enable_gradient_checkpointing()
        self.accumulation = SONGS // batch
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.dtype = setting.dtype
        self.loader = DataLoader(
            PaddedRecords(store_padded(records, folder, condition)),
            batch_size=batch,
            shuffle=True,
            num_workers=WORKERS,
            collate_fn=zero_padded,
        )

    def micro_step(self, batch: dict[str, torch.Tensor]) -> None:
        batch = {name: x.to(self.device) for name, x in batch.items()}
        latents = batch["target_latents"]
        noise = torch.randn_like(latents)
        t = turbo_timesteps().float()[torch.randint(8, (len(latents),))].to(self.device)
        noisy = t[:, None, None] * noise + (1 - t[:, None, None]) * latents
        velocity = self.model(
            hidden_states=noisy.to(self.dtype),
            timestep=t,
            timestep_r=t,
            encoder_hidden_states=batch["encoder_hidden_states"].to(self.dtype),
            context_latents=batch["context_latents"].to(self.dtype),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity.float(), noise - latents) / self.accumulation
        if torch.isnan(loss).item():
            return
        loss.backward()
        self.last_loss = loss.item()
        if any(torch.isnan(p.grad).any().item() for p in self.trained if p.grad is not None):
            self.optimizer.zero_grad()

    def epoch(self) -> None:
        """All songs once, an optimizer step every four songs."""
        for number, batch in enumerate(self.loader, start=1):
            self.micro_step(batch)
            if number % self.accumulation == 0 or number == len(self.loader):
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
