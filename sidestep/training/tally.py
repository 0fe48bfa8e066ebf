"""Losses and gradient norms that wait on the device until the host reads them, all in one transfer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class StepReading:
    """What became of one optimizer step on this process. samples: (song, loss, t) of each."""

    step: int
    grad_norm: float
    samples: tuple[tuple[str, float, float], ...]

    @property
    def was_skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)

    @property
    def finite(self) -> list[tuple[str, float, float]]:
        return [sample for sample in self.samples if math.isfinite(sample[1])]

    @property
    def suspects(self) -> tuple[str, ...]:
        """The songs whose loss is not finite; all of the step's when each loss is and only the gradient is not."""
        bad = [song for song, loss, _ in self.samples if not math.isfinite(loss)]
        return tuple(dict.fromkeys(bad or [song for song, _, _ in self.samples]))


@dataclass
class Tally:
    """Losses [B] and timesteps [B] of micro-steps, a norm [] of each optimizer step, and what the host knows of them."""

    losses: list[torch.Tensor] = field(default_factory=list)
    timesteps: list[torch.Tensor] = field(default_factory=list)
    songs: list[tuple[str, ...]] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)  # (optimizer step, how many micro-steps there were until its end)

    def add(self, loss: torch.Tensor, t: torch.Tensor, songs: tuple[str, ...]) -> None:
        """Keep the plain losses of a micro-step."""
        self.losses.append(loss)
        self.timesteps.append(t)
        self.songs.append(songs)

    def close_step(self, step: int, norm: torch.Tensor) -> None:
        """An optimizer step ended with this gradient norm."""
        self.norms.append(norm)
        self.steps.append((step, len(self.losses)))

    def read(self) -> list[StepReading]:
        """Bring everything to the host and start anew."""
        if not self.steps:
            return []
        values = iter(torch.cat([*self.norms_flat(), *self.losses, *self.timesteps]).tolist())
        readings = list(self._readings(values))
        self.__init__()
        return readings

    def norms_flat(self) -> list[torch.Tensor]:
        return [norm.float().reshape(1) for norm in self.norms]

    def _readings(self, values: Iterator[float]) -> Iterator[StepReading]:
        norms = [next(values) for _ in self.norms]
        losses = [[next(values) for _ in songs] for songs in self.songs]
        timesteps = [[next(values) for _ in songs] for songs in self.songs]
        first = 0
        for (step, last), norm in zip(self.steps, norms, strict=True):
            parts = zip(self.songs[first:last], losses[first:last], timesteps[first:last], strict=True)
            samples = tuple(sample for songs, ls, ts in parts for sample in zip(songs, ls, ts, strict=True))
            yield StepReading(step, norm, samples)
            first = last
