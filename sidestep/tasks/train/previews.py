"""Previews: audio of fixed prompts and seeds while a run goes on, with the adapter as it is now and, once, without it.

They take no part in the training: the same model is used in evaluation mode and put back, and no random number is drawn
but from the prompts' own seeds. Conditions are made once, before the decoder is loaded; the VAE is all that stays.
Another model can play them (`--preview-variant`): while it does, the trained one's weights wait on the CPU. So they do
while the DiT plays what a language model in training has written.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from sidestep.acestep.blocks import set_aside
from sidestep.acestep.checkpoint import CPU, Checkpoint
from sidestep.acestep.conditions import COVER, TEXT2MUSIC, Prompt, TextModels, encode_texts
from sidestep.acestep.device import release_memory
from sidestep.adapters.attach import adapter_of, adapter_scale
from sidestep.adapters.read import read_adapter
from sidestep.data.batches import Song
from sidestep.data.lyrics import without_time_marks
from sidestep.data.sidecars import MAX_BYTES
from sidestep.data.text import read_text
from sidestep.errors import JobError, UserError
from sidestep.events import Notice, Progress, Report, Saved, null
from sidestep.files import portable, write_text
from sidestep.settings.config import TrainConfig
from sidestep.settings.path_checks import PROMPTS_EXAMPLE, short_name
from sidestep.stopping import is_asked_to_stop
from sidestep.tasks.sample import (
    Sampler,
    Sampling,
    described,
    load_model,
    open_sampler,
    players_of,
    prompt_of,
    require_same_codes,
    require_same_modules,
    sampling_for,
    slug,
    tell_lost_tokens,
    typed_lyrics,
    write_take,
)
from sidestep.tasks.think import Thinking, Thought, composed, hints_for, think
from sidestep.tasks.train.language import LanguageCheckpoint, is_language
from sidestep.tasks.train.run import Player, Position, Previews, Run
from sidestep.variants import Variant
from sidestep.words import count

FOLDER = "previews"
BASE = "base"  # its subfolder of audio without the adapter
SONGS_AS_PROMPTS = 2
FAILURES = (torch.OutOfMemoryError, OSError, JobError, UserError)  # that cost previews, not the run


def previews_for(
    config: TrainConfig,
    checkpoint: Checkpoint,
    songs: Sequence[Song],
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    models: TextModels | None = None,
) -> Previews | None:
    """The previews that the settings ask for, None for none.

    Call it before the decoder is loaded: the encoders then have the device for themselves. Raises UserError for prompts
    that cannot be used.
    """
    prompts = prompts_for(config, songs)
    if not prompts:
        return None
    when = f"every {config.preview_every} epochs and at the end" if config.preview_every else "at the end"
    if is_language(config):
        report(Notice(message=f"Previews {when}: {count(len(prompts), 'prompt')}, composed and then played"))
        adapter = read_adapter(config.preview_adapter) if config.preview_adapter else None
        return Previews(prompts, [], dtype, adapter=adapter)
    thoughts: list[Thought] = []
    if config.preview_think:
        thinking = Thinking(
            adapter=config.preview_adapter, flag="--preview-adapter", base_precision=config.base_precision
        )
        thoughts = think(checkpoint, prompts, thinking, device, dtype, report)
        prompts = [thought.prompt for thought in thoughts]
        release_memory(device)
    players = players_for(config, checkpoint, prompts, device, dtype, report, models or TextModels(), thoughts)
    how = ", ".join(
        f"{described(player.sampling)}{f' on {player.checkpoint.folder.name}' if player.folder else ''}"
        for player in players
    )
    report(Notice(message=f"Previews {when}: {count(len(prompts), 'prompt')}, {how}"))
    return Previews(prompts, players, dtype, [thought.told for thought in thoughts])


def players_for(
    config: TrainConfig,
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    models: TextModels,
    thoughts: Sequence[Thought] = (),
) -> list[Player]:
    """The models that play the prompts, with their conditions. Raises JobError or UserError where one cannot.

    thoughts: of the prompts, where they were composed.
    """
    checkpoint.vae_config()  # a missing VAE is an error now, not after the first epochs
    players = []
    found = players_of(config, report)
    if thoughts:
        require_same_codes([checkpoint, *found])
    for player in found:
        is_own = player.folder == checkpoint.folder
        if not is_own:
            require_same_modules(checkpoint, player)
        instruction = COVER if thoughts else TEXT2MUSIC
        texts = [prompt.text_for(player.variant.is_stems, instruction) for prompt in prompts]
        conditions = list(encode_texts(player, texts, device, dtype, models))
        for prompt, states in zip(prompts, conditions, strict=True):
            tell_lost_tokens(prompt, states, report)
        # turbo's shift, as it was told to this run, is not another model's
        sampling = preview_sampling(config, player.variant) if is_own else sampling_for(player.variant)
        folder = "" if is_own else f"on-{portable(short_name(player.folder.name))}"
        hints = hints_for(player, thoughts, device, dtype) if thoughts else [None] * len(prompts)
        players.append(Player(checkpoint if is_own else player, conditions, sampling, folder, hints))
    return players


def preview_now(run: Run) -> None:
    """Previews because a person asked for them, also in a run that was set up without: of its first songs' captions.

    The encoders then run on the CPU, since the device is full of training.
    """
    previews = run.previews or run.asked_previews
    if previews is None:
        config, prompts, players, problem = replace(run.config, preview_every=1), [], [], ""
        try:
            prompts = prompts_for(config, run.songs)
            if not is_language(config) and _plays(run):
                players = players_for(config, run.checkpoint, prompts, CPU, torch.float32, run.report, TextModels())
        except (OSError, MemoryError, UserError, JobError) as error:
            problem = str(error).splitlines()[0]
        if any(run.processes.any(bool(problem))):
            problem = problem or "another process could not prepare them"
            run.report(Notice(message=f"No previews: {problem}", level="warning"))
            return
        dtype = (run.objective.lm.model.lm_head.weight if is_language(config) else run.objective.null_condition).dtype
        previews = run.asked_previews = Previews(prompts, players, dtype)
    make_previews(run, previews)


def preview_sampling(config: TrainConfig, variant: Variant) -> Sampling:
    """As `sample` does it; the shift that a turbo run was told to learn is the one it is heard with."""
    variant = variant.settled(config.timestep_mode)
    return sampling_for(variant, shift=config.timestep_shift if variant.is_turbo else None)


def prompts_for(config: TrainConfig, songs: Sequence[Song]) -> list[Prompt]:
    """What to listen to: the file's prompts, the typed one, or with `--preview-every` alone the first songs' own.

    Raises UserError.
    """
    shared = {"duration": config.preview_duration, "seed": config.preview_seed}
    if config.preview_prompts:
        path = config.preview_prompts
        if config.preview_prompt:
            raise UserError("--preview-prompt and --preview-prompts are both given.", "Leave one of them away.")
        return [prompt_of(shared | values, f"{path}: $[{i}]") for i, values in enumerate(read_prompts(path))]
    if config.preview_prompt:
        typed = {"prompt": config.preview_prompt, "lyrics": typed_lyrics(config.preview_lyrics)}
        return [prompt_of(shared | typed, "")]
    if not config.preview_every:
        return []
    prompts = []
    for song in songs:
        caption = song.metadata.get("prompt_caption") or song.metadata.get("caption")
        if caption and len(prompts) < SONGS_AS_PROMPTS:
            # what the composer is to learn is not given to it
            given = ("language",) if is_language(config) else ("language", "bpm", "keyscale", "timesignature")
            values = {name: song.metadata.get(name) for name in given}
            values |= {"caption": caption, "lyrics": without_time_marks(song.metadata.get("lyrics") or "")}
            prompts.append(prompt_of(shared | values, "training tensors"))
    if not prompts:
        raise UserError(
            "--preview-every: the training tensors do not say what their songs are, so there is nothing to ask the "
            "model for.",
            "Say it: --preview-prompt 'warm lofi hip hop'",
        )
    return prompts


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSON file of prompts, each a caption or an object. Raises UserError."""
    text, problem = read_text(path, MAX_BYTES)
    if problem and not text:
        raise UserError(f"--preview-prompts {path} {problem}.", PROMPTS_EXAMPLE)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--preview-prompts {path}: no JSON ({error}).", PROMPTS_EXAMPLE) from None
    content = content.get("prompts", content) if isinstance(content, dict) else content
    entries = [{"prompt": e} if isinstance(e, str) else e for e in content] if isinstance(content, list) else []
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"--preview-prompts {path}: holds no list of prompts.", PROMPTS_EXAMPLE)
    return entries


def make_previews(run: Run, previews: Previews) -> None:
    """Write `previews/base/` once and `previews/epoch_NNNN/` each time: a .flac for each prompt, its .json beside it.

    The same below `previews/on-…/` for each other model that plays. Nothing is done for a step that has its previews.
    A failure (memory, disk) costs the previews, not the run.
    """
    if previews.made_at == run.position.step:
        return
    kinds = [None] if is_language(run.config) else previews.players  # None: what is trained composes
    for player in kinds if _plays(run) else ():
        try:
            if player is None:
                _hear_composer(run, previews)
            elif player.folder:
                _hear_elsewhere(run, previews, player)
            else:
                # where the weights are sharded over processes, the wrapper gathers them
                decoder = run.wrapped if run.accelerator.is_fsdp2 else run.model.get_base_model()
                with undisturbed(run):
                    _hear(run, previews, player, decoder, run.model)
        except FAILURES as error:
            run.report(Notice(message=f"No previews this time: {str(error).splitlines()[0]}", level="warning"))
    previews.made_at = run.position.step
    run.processes.wait()


def _plays(run: Run) -> bool:
    """Whether this process calls the model for previews: sharded over processes, it works when all of them do."""
    return run.is_main or run.accelerator.is_fsdp2


def _hear(run: Run, previews: Previews, player: Player, decoder: torch.nn.Module, model: PeftModel) -> None:
    """Write the takes of one player that are missing, and those of the adapter on `model` as it is now."""
    position, folder, is_sharded = (
        run.position,
        run.config.output_dir / FOLDER / player.folder,
        run.accelerator.is_fsdp2,
    )
    now, names = folder_now(position), names_of(previews.prompts)
    offload = run.config.offload_encoder
    sampler = open_sampler(player.checkpoint, decoder, run.device, previews.dtype, player.sampling, offload)
    sampler = replace(sampler, vae=previews.vae or sampler.vae)
    previews.vae = sampler.vae
    thoughts = previews.composed or [None] * len(names)
    missing = [
        number
        for number, prompt in enumerate(previews.prompts)
        if not is_up_to_date(folder / BASE / f"{names[number]}.flac", prompt, sampler, thoughts[number])
    ]
    if is_sharded:
        missing = run.processes.gather(missing)[0]  # all must call the model equally often
    takes = [(BASE, 0.0, number) for number in missing]
    takes += [(now, 1.0, number) for number in range(len(previews.prompts))]
    task = f"Previews {player.folder}".strip().replace("-", " ", 1)
    for done, (subfolder, strength, number) in enumerate(takes):
        if _stops(run, len(takes) - done):
            break
        name, prompt = names[number], previews.prompts[number]
        run.report(Progress(task=task, done=done, total=len(takes), current=name))
        with adapter_scale(model, strength):
            latents = sampler.latents(prompt, player.conditions[number].states, player.hints[number])
        step, epoch = (position.step, position.epoch) if strength else (0, 0)
        metadata = {
            "strength": strength,
            "step": step,
            "epoch": epoch,
            "checkpoint": player.checkpoint.folder.name,
            **({"composed": thoughts[number]} if thoughts[number] else {}),
        }
        with _by_the_first(run) as writes:
            if writes:
                audio = sampler.audio(latents, prompt)
                write_take(folder / subfolder / f"{name}.flac", sampler, audio, prompt, metadata)
                tag = f"previews/{f'{player.folder}/' if player.folder else ''}{name}/strength {strength:g}"
                run.tensorboard.add_audio(tag, audio.mean(axis=0)[None], step, sampler.sample_rate)
    run.report(Progress(task=task, done=len(takes), total=len(takes)))
    if (folder / now).is_dir():  # a run that was asked to stop may have made none
        run.report(Saved(what="previews", path=str(folder / now)))


@contextmanager
def _by_the_first(run: Run) -> Iterator[bool]:
    """What only the first process does, which is told by True. Where it fails all raise, or the others wait for it."""
    failure: Exception | None = None
    try:
        yield run.is_main
    except FAILURES as error:
        failure = error
    if run.accelerator.is_fsdp2 and any(run.processes.any(failure is not None)) and failure is None:
        failure = JobError("the first process could not write them")
    if failure is not None:
        raise failure


def _hear_elsewhere(run: Run, previews: Previews, player: Player) -> None:
    """The takes of a model that is not trained, with the adapter as it would be saved. Raises JobError."""
    adapter = adapter_of(run.model)

    def hear() -> None:
        config, checkpoint, device = run.config, player.checkpoint, run.device
        decoder, model = load_model(config, checkpoint, adapter, device, previews.dtype, null)
        assert model is not None
        _hear(run, previews, player, decoder, model)

    _while_set_aside(run, hear)


def _while_set_aside(run: Run, hear: Callable[[], None]) -> None:
    """Another model comes onto the device when the trained one's weights have left. No random number is used.

    Raises JobError when the model or the audio does not fit into memory or cannot be written.
    """
    problem, devices = "", [run.device] if run.device.type == "cuda" else []
    with set_aside(run.model), torch.random.fork_rng(devices):
        release_memory(run.device)
        try:
            hear()
        except FAILURES as error:
            problem = str(error).splitlines()[0]  # the error itself holds on to the model through its traceback
        release_memory(run.device)
    if problem:
        raise JobError(problem)


def _hear_composer(run: Run, previews: Previews) -> None:
    """What a language model in training writes for the prompts, kept beside the others and then played by the DiT.

    Once in a process without the adapter, too. What was written stays where it cannot be played: JobError is raised.
    """
    if run.accelerator.is_fsdp2:
        raise JobError("under FSDP the language model is in pieces, which cannot write.")
    position, names = run.position, names_of(previews.prompts)
    folder, now = run.config.output_dir / FOLDER, folder_now(position)
    takes: list[tuple[Path, Prompt, Thought, dict[str, Any]]] = []
    for subfolder, strength in ((BASE, 0.0), (now, 1.0)) if previews.made_at < 0 else ((now, 1.0),):
        thinking = Thinking(adapter=run.config.output_dir, strength=strength)
        with undisturbed(run), adapter_scale(run.model, strength):
            thoughts = composed(run.objective.lm, previews.prompts, thinking, run.report)
        step, epoch = (position.step, position.epoch) if strength else (0, 0)
        for name, asked, thought in zip(names, previews.prompts, thoughts, strict=True):
            said = {"strength": strength, "step": step, "epoch": epoch, "composed": thought.told}
            path = folder / subfolder / f"{name}.json"
            write_text(path, json.dumps({"prompt": asdict(asked), **said}, ensure_ascii=False, indent=2) + "\n")
            takes.append((path.with_suffix(".flac"), asked, thought, said))
    run.report(Saved(what="previews", path=str(folder / now)))
    assert isinstance(run.checkpoint, LanguageCheckpoint)
    dit = run.checkpoint.dit
    place, thoughts = (run.device, previews.dtype), [thought for _, _, thought, _ in takes]

    def hear() -> None:
        hints = hints_for(dit, thoughts, *place)
        texts = [thought.prompt.text_for(dit.variant.is_stems, COVER) for thought in thoughts]
        conditions = list(encode_texts(dit, texts, *place))
        decoder, _ = load_model(run.config, dit, previews.adapter, *place, null)
        sampler = open_sampler(dit, decoder, *place, sampling_for(dit.variant), offload=True)
        for number, (path, asked, _, said) in enumerate(takes):
            if _stops(run, len(takes) - number):
                break
            run.report(Progress(task="Previews", done=number, total=len(takes), current=path.stem))
            audio = sampler.audio(sampler.latents(asked, conditions[number].states, hints[number]), asked)
            write_take(path, sampler, audio, asked, {"checkpoint": dit.folder.name, **said})
            tag = f"previews/{path.stem}/strength {said['strength']:g}"
            run.tensorboard.add_audio(tag, audio.mean(axis=0)[None], said["step"], sampler.sample_rate)
        run.report(Progress(task="Previews", done=len(takes), total=len(takes)))

    _while_set_aside(run, hear)


def _stops(run: Run, left: int) -> bool:
    """Whether the run was asked to stop, so that the takes that are left are not made; says so."""
    stops = is_asked_to_stop()
    if run.accelerator.is_fsdp2:  # all must call the model equally often
        (stops,) = run.processes.any(stops)
    if stops and run.is_main:
        run.report(Notice(message=f"{count(left, 'preview')} left out, since the run was asked to stop."))
    return stops


def folder_now(position: Position) -> str:
    """The folder of the previews made at a position."""
    return f"step_{position.step:06}" if position.step_in_epoch else f"epoch_{position.epoch:04}"


def names_of(prompts: Sequence[Prompt]) -> list[str]:
    """File names of the prompts, without their ending."""
    return [f"{number:02}-{slug(prompt.caption, 30)}" for number, prompt in enumerate(prompts, 1)]


def is_up_to_date(audio: Path, prompt: Prompt, sampler: Sampler, composed: dict[str, Any] | None) -> bool:
    """Whether the base model's audio of a prompt is there from before, of the same prompt, made in the same way."""
    try:
        made = json.loads(audio.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = (made.get("prompt"), made.get("sampling")) == (asdict(prompt), asdict(sampler.sampling))
    return same and made.get("composed") == composed and audio.is_file()


@contextmanager
def undisturbed(run: Run) -> Iterator[None]:
    """The model in evaluation mode, every condition token visible, layers not compiled for these lengths.

    All of it is put back afterwards.
    """
    mask, was_training = run.objective.condition_mask, run.model.training
    hidden, mask.mask = mask.mask, None
    run.model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if run.is_compiled else nullcontext():
            yield
    finally:
        run.model.train(was_training)
        mask.mask = hidden
