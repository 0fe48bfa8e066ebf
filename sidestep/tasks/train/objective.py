"""What a micro-step computes: the loss of a batch, with the noise, timesteps and dropped conditions of its step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.ace_step_transformer import AceStepAttnProcessor2_0

from sidestep.acestep.blocks import offload_activations
from sidestep.acestep.conditions import context_latents, tiled_silence
from sidestep.acestep.device import to_device
from sidestep.data.batches import Batch, Item, MicroBatch, Song, collate, nearest
from sidestep.errors import UserError
from sidestep.flow_matching.guidance import drop_conditions
from sidestep.flow_matching.loss import flow_matching_loss, min_snr_weight, uniform_weight
from sidestep.flow_matching.timesteps import Law, discrete, logit_normal, stratified
from sidestep.seeding import seed_for, uniform
from sidestep.settings.config import TrainConfig
from sidestep.variants import Variant

GRID_TIMESTEPS = 8  # midpoints of equally likely parts of the law: on turbo its eight steps
GRID_WINDOWS = 4  # of a song, evenly spaced


@dataclass(frozen=True)
class TrainingLaw:
    """How timesteps are drawn and how often conditions are dropped, with the reason that is shown."""

    name: str
    draw: Law
    cfg_ratio: float
    reason: str
    shift_reason: str = ""  # of turbo's timesteps


def training_law(config: TrainConfig, variant: Variant) -> TrainingLaw:
    """The checkpoint's own law, but for what the user typed. Raises UserError where its signs contradict each other."""
    if config.timestep_mode == "auto" and variant.doubt:
        raise UserError(
            f"{variant.doubt}: a merge of models that learnt under different laws of timesteps does not say which it "
            "follows.",
            "Add --timestep-mode discrete if it makes good music in 8 steps without guidance, as turbo does; "
            "else --timestep-mode logit-normal",
        )
    mode = variant.under(config.timestep_mode).timestep_mode
    variant = variant.settled(config.timestep_mode)
    mu = variant.timestep_mu if config.timestep_mu is None else config.timestep_mu
    sigma = variant.timestep_sigma if config.timestep_sigma is None else config.timestep_sigma
    cfg_ratio = variant.cfg_ratio if config.cfg_ratio is None else config.cfg_ratio
    is_typed = {
        "--timestep-mode": config.timestep_mode != "auto",
        "--cfg-ratio": config.cfg_ratio is not None,
    }
    typed = " and ".join(flag for flag, given in is_typed.items() if given)
    reason = variant.reason + (f"; {typed} typed" if typed else "")
    if mode == "discrete":
        shift = variant.shift if config.timestep_shift is None else config.timestep_shift
        why = "--timestep-shift typed" if config.timestep_shift is not None else variant.shift_reason
        name = f"discrete, 8 steps, shift {shift:g}"
        return TrainingLaw(name, partial(discrete, shift=shift), cfg_ratio, reason, f"; shift: {why}")
    if config.timestep_shift is not None:
        raise UserError(
            f"--timestep-shift {config.timestep_shift:g}: only turbo's eight timesteps have a shift, and "
            f"{variant.name} is trained with the logit-normal law ({reason}).",
            "Leave it away; to move that law use --timestep-mu.",
        )
    return TrainingLaw(f"logit-normal, mu {mu:g}, sigma {sigma:g}", logit_normal(mu, sigma), cfg_ratio, reason)


class ConditionMask:
    """Hides pad tokens of a batch from cross attention. One object serves all layers; None: every token is real."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None

    def install(self, decoder: Any) -> None:
        """Let the decoder's cross attention read this mask; the decoder itself passes none."""
        for block in decoder.layers:
            block.cross_attn.set_processor(_MaskedCrossAttention(self))


class _MaskedCrossAttention(AceStepAttnProcessor2_0):
    def __init__(self, shared: ConditionMask):
        super().__init__()
        self.shared = shared

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,  # noqa: ARG002 - diffusers passes it by name, always empty
        image_rotary_emb=None,
    ):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.shared.mask, image_rotary_emb)


class Objective:
    """The training loss. Random numbers depend on the run's seed, the optimizer step and the sample's slot in it alone.

    silence: [1, T0, D] and null_condition: [1, 1, C], both on the training device.
    """

    def __init__(
        self,
        config: TrainConfig,
        law: TrainingLaw,
        silence: torch.Tensor,
        null_condition: torch.Tensor,
        condition_mask: ConditionMask,
    ):
        self.law, self.silence, self.null_condition, self.condition_mask = law, silence, null_condition, condition_mask
        self.weight = min_snr_weight(config.snr_gamma) if config.loss_weighting == "min_snr" else uniform_weight
        self.seed, self.batch_size, self.hints_only = config.seed, config.batch_size, config.hints_ratio == 1
        self._activations = partial(offload_activations, silence.device) if config.offload_activations else nullcontext
        self._generator = torch.Generator(silence.device)

    @property
    def device(self) -> torch.device:
        return self.silence.device

    def collate(self, songs: Sequence[Song], micro_batch: MicroBatch) -> Batch:
        """The tensors of a micro-batch on the device."""
        return collate(songs, micro_batch, pin=self.device.type == "cuda").to(self.device)

    def grid(self, songs: Sequence[Song]) -> list[MicroBatch]:
        """What songs are validated on."""
        return grid(songs, self.batch_size, self.hints_only)

    def grid_loss(self, model: torch.nn.Module, songs: Sequence[Song], cells: MicroBatch) -> torch.Tensor:
        """Plain loss [B] of cells of the grid, the same for the same weights."""
        midpoints = (torch.arange(GRID_TIMESTEPS, dtype=torch.float64) + 0.5) / GRID_TIMESTEPS
        timesteps = self.law.draw(midpoints).float()[list(cells.slots)]
        batch, noise = collate(songs, cells).to(self.device), grid_noise(songs, cells).to(self.device)
        return self.loss(model, batch, noise, timesteps.to(self.device))

    def timesteps(self, step: int, samples: int, stream: str = "") -> torch.Tensor:
        """All timesteps of an optimizer step, fp32 [samples] on the CPU, spread evenly over the law.

        stream: of random numbers; empty for the songs that are learnt, "prior " for the other music.
        """
        generator = torch.Generator().manual_seed(seed_for(self.seed, f"{stream}timesteps", step))
        return self.law.draw(stratified(samples, generator)).float()

    def noise(self, step: int, batch: Batch, stream: str = "") -> torch.Tensor:
        """Noise [B, T, D], drawn on the device sample by sample."""
        draws = []
        for slot in batch.slots:
            self._generator.manual_seed(seed_for(self.seed, f"{stream}noise", step, slot))
            draws.append(torch.randn(batch.latents.shape[1:], generator=self._generator, device=self.silence.device))
        return torch.stack(draws)

    def dropped(self, step: int, slots: tuple[int, ...], stream: str = "") -> torch.Tensor | None:
        """Which samples lose their condition, bool [B] on the CPU; None when none does."""
        drops = [uniform(self.seed, f"{stream}cfg", step, slot) < self.law.cfg_ratio for slot in slots]
        return torch.tensor(drops) if any(drops) else None

    def drops_all(self, step: int, samples: int) -> bool:
        """Whether every sample of an optimizer step loses its condition.

        Then keys of cross attention are all alike, and neither they nor the queries have a gradient.
        """
        dropped = self.dropped(step, tuple(range(samples)))
        return dropped is not None and bool(dropped.all())

    def draws(
        self, batch: Batch, step: int, samples: int, stream: str = ""
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(t [B], noise [B, T, D], which samples lose their condition) on the device; seeds the adapter's dropout."""
        torch.manual_seed(seed_for(self.seed, f"{stream}dropout", step, batch.slots[0]))
        device = self.silence.device
        t = to_device(self.timesteps(step, samples, stream)[list(batch.slots)], device)
        dropped = self.dropped(step, batch.slots, stream)
        return t, self.noise(step, batch, stream), None if dropped is None else to_device(dropped, device)

    def __call__(
        self, model: torch.nn.Module, batch: Batch, step: int, samples: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(weighted loss [B], plain loss [B], t [B]) of a batch, one part of an optimizer step of `samples`."""
        t, noise, dropped = self.draws(batch, step, samples)
        loss = self.loss(model, batch, noise, t, dropped)
        return self.weighted(loss, t), loss.detach(), t

    def weighted(self, loss: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The losses [B] as they count. One that is no number spoils its step, whatever the model's gradient of it is.

        A norm of values beyond the range has the gradient zero, in which nobody would see what happened.
        """
        return loss * torch.where(torch.isfinite(loss.detach()), self.weight(t), torch.nan)

    def preservation(
        self,
        model: torch.nn.Module,
        batch: Batch,
        step: int,
        samples: int,
        without_adapter: Callable[[], AbstractContextManager[Any]],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same for other music: how far the velocity is from that of the model inside `without_adapter()`."""
        t, noise, dropped = self.draws(batch, step, samples, "prior ")
        velocity, t_ = self.velocity(model, batch, dropped), t[:, None, None]
        noisy = (1 - t_) * batch.latents + t_ * noise
        with torch.no_grad(), without_adapter():
            target = velocity(noisy, t).float()
        with self._activations():
            loss = (velocity(noisy, t).float() - target).square().mean((1, 2))
        return self.weighted(loss, t), loss.detach(), t

    def loss(
        self,
        model: torch.nn.Module,
        batch: Batch,
        noise: torch.Tensor,
        t: torch.Tensor,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Plain per-sample loss [B] for given noise [B, T, D] and timesteps [B]."""
        with self._activations():
            return flow_matching_loss(self.velocity(model, batch, dropped), batch.latents, noise, t)

    def velocity(
        self, model: torch.nn.Module, batch: Batch, dropped: torch.Tensor | None = None
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The model's velocity under a batch's conditions: (x_t [B, T, D], t [B]) → [B, T, D]."""
        frames = batch.latents.shape[1]
        source = tiled_silence(self.silence, frames).expand_as(batch.latents) if batch.source is None else batch.source
        context = context_latents(source.to(self.null_condition.dtype))
        conditions = batch.conditions.to(self.null_condition.dtype)
        if dropped is not None:
            conditions = drop_conditions(conditions, self.null_condition, dropped)
        self.condition_mask.mask = None if batch.condition_mask is None else batch.condition_mask[:, None, None, :]

        def velocity(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return model(
                hidden_states=noisy.to(context.dtype),
                timestep=t,
                timestep_r=t,
                encoder_hidden_states=conditions,
                context_latents=context,
                return_dict=False,
            )[0]

        return velocity


def grid(songs: Sequence[Song], batch_size: int, hints: bool) -> list[MicroBatch]:
    """The cells of the grid in batches of one window each; a cell's slot is the number of its timestep."""
    batches = []
    for index, song in enumerate(songs):
        if song.windows is None:
            windows = [Item(index, 0, song.frames)]
        else:
            starts = song.windows.starts
            wanted = [round(starts[-1] * i / (GRID_WINDOWS - 1)) for i in range(GRID_WINDOWS)]
            found = dict.fromkeys(nearest(starts, start) for start in wanted)
            windows = [Item(index, starts[i], song.windows.frames, song.windows.which[i]) for i in found]
        for item in windows:
            for first in range(0, GRID_TIMESTEPS, batch_size):
                slots = tuple(range(first, min(first + batch_size, GRID_TIMESTEPS)))
                batches.append(MicroBatch((item,) * len(slots), slots, hints and song.has_hints))
    return batches


def grid_noise(songs: Sequence[Song], cells: MicroBatch) -> torch.Tensor:
    """The noise [B, T, D] of cells of one window: it depends on the song's name, the window and the timestep alone."""
    item = cells.items[0]
    song, draws = songs[item.song], []
    channels = song.read().target_latents.shape[1]
    for slot in cells.slots:
        generator = torch.Generator().manual_seed(seed_for("grid", song.name, item.start, slot))
        draws.append(torch.randn((item.frames, channels), generator=generator))
    return torch.stack(draws)
