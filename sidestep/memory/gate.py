"""Before a run: how much memory it will take, and a refusal when it cannot fit."""

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision
from sidestep.config import TrainConfig
from sidestep.data.samples import RecordError, find_records, load_record
from sidestep.errors import UserError
from sidestep.events import Chosen, Report
from sidestep.memory.device import GIB, Device, this_device
from sidestep.memory.plan import FRAMES_PER_SECOND, Planner


def require_fit(config: TrainConfig, report: Report) -> None:
    """Report the memory that a run needs on a CUDA GPU. Raises UserError when there is less, unless `--even-if-it-does-not-fit` was typed.

    The longest song decides, with the most condition tokens that any song has.
    """
    device = this_device()
    if device is None or choose_device(config.device).value.type != "cuda":
        return
    require_fit_on(device, config, report)


def require_fit_on(device: Device, config: TrainConfig, report: Report) -> None:
    """`require_fit` for a device whose memory is known."""
    frames, tokens = longest(config)
    if not frames:
        return
    sizes = decoder_sizes(open_checkpoint(config.checkpoint_dir, config.model_variant).config)
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    planner = Planner(sizes, dtype, frames / FRAMES_PER_SECOND, tokens)
    asked = planner.candidate(config)
    needed = f"{asked.needed / GIB:.1f} of {device.bytes / GIB:.1f} GiB"
    if asked.needed <= device.bytes or config.even_if_it_does_not_fit:
        report(Chosen(what="memory", value=needed, reason="the step was run on tensors without bytes; context and slack are added"))
        return
    best = planner.mildest(config, device.bytes)
    fix = f"These settings fit: {' '.join(best.flags)}" if best else "No settings fit this card: use a larger one."
    raise UserError(f"This run needs {needed} ({device.source}): it would run out of memory.", f"{fix}\nTo try all the same: --even-if-it-does-not-fit")


def longest(config: TrainConfig) -> tuple[int, int]:
    """(latent frames of the longest song, condition tokens of the wordiest) in `--dataset-dir`; zeros where nothing is readable yet."""
    frames, tokens = 0, 0
    for path in find_records(config.dataset_dir) if config.dataset_dir.is_dir() else []:
        try:
            record = load_record(path)
        except RecordError:
            continue  # training reports it
        frames, tokens = max(frames, len(record.target_latents)), max(tokens, len(record.encoder_hidden_states))
    return frames, tokens
