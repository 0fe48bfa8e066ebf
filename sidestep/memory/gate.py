"""Before a run: how much memory it will take, a refusal when it cannot fit, and as little recomputation as fits where that was asked for."""

from dataclasses import replace

from sidestep.acestep.checkpoint import decoder_sizes, open_checkpoint
from sidestep.acestep.device import choose_device, choose_precision
from sidestep.config import TrainConfig
from sidestep.data.samples import RecordError, find_records, load_record
from sidestep.errors import UserError
from sidestep.events import Chosen, Notice, Report
from sidestep.memory.device import GIB, Device, this_device
from sidestep.memory.plan import FRAMES_PER_SECOND, Planner


def fitted(config: TrainConfig, report: Report) -> TrainConfig:
    """The settings with which a run fits into the GPU: as they are, but that `--recompute-as-needed` becomes a number of layers.

    Raises UserError when the run cannot fit, unless `--even-if-it-does-not-fit` was typed. The longest song decides, with the most condition tokens
    that any song has. Without a CUDA GPU nothing is known and nothing refused.
    """
    device = this_device()
    if device is not None and choose_device(config.device).value.type == "cuda":
        return fitted_to(device, config, report)
    if config.recompute_as_needed:
        report(Chosen(what="recomputation", value="all layers", reason="--recompute-as-needed knows only the memory of CUDA GPUs"))
    return replace(config, recompute_as_needed=False)


def fitted_to(device: Device, config: TrainConfig, report: Report) -> TrainConfig:
    """`fitted` for a device whose memory is known."""
    as_needed, config = config.recompute_as_needed, replace(config, recompute_as_needed=False)
    frames, tokens = longest(config)
    if not frames:
        return config
    sizes = decoder_sizes(open_checkpoint(config.checkpoint_dir, config.model_variant).config)
    dtype = choose_precision(config.precision, choose_device(config.device).value).value
    planner = Planner(sizes, dtype, frames / FRAMES_PER_SECOND, tokens)
    if as_needed:
        config = replace(config, recompute_layers=planner.least_recomputation(config, device.free))
        layers = "all" if config.recompute_layers is None else f"{config.recompute_layers} of {sizes['num_hidden_layers']}"
        report(Chosen(what="recomputation", value=f"{layers} layers", reason="as few as fit"))
    asked = planner.candidate(config)
    needed = f"{asked.needed / GIB:.1f} of {device.bytes / GIB:.1f} GiB"
    if asked.needed > device.bytes and not config.even_if_it_does_not_fit:
        best = planner.mildest(config, device.bytes)
        fix = f"These settings fit: {' '.join(best.flags)}" if best else "No settings fit this card: use a larger one."
        raise UserError(f"This run needs {needed} ({device.source}): it would run out of memory.", f"{fix}\nTo try all the same: --even-if-it-does-not-fit")
    report(Chosen(what="memory", value=needed, reason="the step was run on tensors without bytes; context and slack are added"))
    if device.free < asked.needed <= device.bytes:
        message = f"Other programs hold {device.taken / GIB:.1f} GiB of {device.source}: this run may run out of memory while they go on."
        report(Notice(message=message, level="warning"))
    wants_previews = config.preview_every or config.preview_prompt or config.preview_prompts
    if wants_previews and (preview := planner.preview(config)) > device.free:
        shorter = "make them shorter (--preview-duration)" + ("" if config.offload_encoder else " or add --offload-encoder")
        message = f"A preview needs {preview / GIB:.1f} of the {device.free / GIB:.1f} GiB that are free: there may be none. To have them, {shorter}."
        report(Notice(message=message, level="warning"))
    return config


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
