"""What is watched while a run trains: that every tensor of the adapter learns, and that no song stops fitting in."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from peft import PeftModel

from sidestep.adapters.names import to_original
from sidestep.errors import JobError
from sidestep.tasks.train.processes import Processes, own_part

VISITS_OF_HISTORY = 10  # before a song can be judged by its own
VISITS_ABOVE = 5  # in a row, until it is named
FAR_FACTOR, FAR_DEVIATIONS = 1.5, 3.0  # above the song's own mean: both must be passed
BINS = 20  # of timesteps, whose losses differ in size


def require_gradients(model: PeftModel, processes: Processes, step: int) -> None:
    """Raises JobError that names the first module of which a tensor has no gradient, or zeros alone, after a backward.

    Excused is what another tensor of its module, all zero at the start, multiplies: lora_A of a fresh LoRA beside
    lora_B, W2 of a LoKr beside W1, of a LoHa all factors but the zero one. That one must have a gradient itself, and
    magnitudes always. Every process must call it.
    """
    tensors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    flags: list[float] = []
    for _, parameter in tensors:
        for tensor in (parameter.grad, parameter.detach()):
            own = own_part(tensor)
            flags.append(float(own is not None and bool((own != 0).any())))
    seen = [total > 0 for total in processes.sum(flags)]
    learning = {name: learns for (name, _), learns in zip(tensors, seen[::2], strict=True)}
    started = {
        _module_of(name)
        for (name, _), is_set, learns in zip(tensors, seen[1::2], seen[::2], strict=True)
        if not is_set and learns
    }
    dead = [n for n, learns in learning.items() if not learns and ("magnitude" in n or _module_of(n) not in started)]
    if dead:
        module = to_original(_module_of(dead[0]).removeprefix("base_model.model."))
        more = f", and {len(dead) - 1} more tensors" if len(dead) > 1 else ""
        raise JobError(
            f"{module}: its adapter gets no gradient at optimizer step {step} ({dead[0]}{more}): it would never learn.",
            "Nothing was saved of this step. Try --precision fp32 and without --compile; if it stays, send the log of "
            "the run with a bug report.",
        )


def _module_of(name: str) -> str:
    """The adapted module of a tensor, by peft's name of the tensor."""
    return re.split(r"\.(?:lora|lokr|hada|oft)_", name)[0]


@dataclass
class SongWatch:
    """Each song's loss against its own history. What it finds depends on the samples' order, not on how they come.

    A loss is compared with the mean of its timestep's part of the law, over all songs. songs: by name, [visits, mean,
    sum of squared deviations, visits far above in a row], of the logarithm of that ratio. named: those told of.
    """

    sums: list[float] = field(default_factory=lambda: [0.0] * BINS)
    counts: list[int] = field(default_factory=lambda: [0] * BINS)
    songs: dict[str, list[float]] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)

    def add(self, samples: Iterable[tuple[str, float, float]]) -> list[tuple[str, float]]:
        """Take in (song, loss, t) of samples in their order.

        Returns the songs that stayed far above their own history since, each once in a run, with the factor.
        """
        found = []
        for song, loss, t in samples:
            if not (math.isfinite(loss) and loss > 0):
                continue
            part = min(int(t * BINS), BINS - 1)
            usual = self.sums[part] / self.counts[part] if self.counts[part] else loss
            self.sums[part] += loss
            self.counts[part] += 1
            ratio = math.log(loss / usual)
            entry = self.songs.setdefault(song, [0, 0.0, 0.0, 0])
            visits, mean, squares, above = entry
            deviation = math.sqrt(squares / visits) if visits else 0.0
            if visits >= VISITS_OF_HISTORY and ratio - mean > max(math.log(FAR_FACTOR), FAR_DEVIATIONS * deviation):
                entry[3] = above + 1
                if entry[3] == VISITS_ABOVE and song not in self.named:
                    self.named.append(song)
                    found.append((song, math.exp(ratio - mean)))
                continue
            mean_now = mean + (ratio - mean) / (visits + 1)
            entry[:] = visits + 1, mean_now, squares + (ratio - mean) * (ratio - mean_now), 0
        return found
