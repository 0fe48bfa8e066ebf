"""`demo`: the whole pipeline on a tiny model and on music made here, by the functions that a user's songs pass.

First the pipeline. Then its music: four short pieces of sines and noise, with the text that a musician would put beside
them. Then its model: a checkpoint in the original layout, the real architecture at a hundred-thousandth of its size,
whose weights are random: it makes noise, not music.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step.modeling_ace_step import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from sidestep.acestep.checkpoint import accepted
from sidestep.acestep.device import threads_for
from sidestep.acestep.layout import TEXT_ENCODER_FOLDER, original_key
from sidestep.acestep.vae import encode_mean
from sidestep.audio.io import SAMPLE_RATE
from sidestep.errors import UserError
from sidestep.events import EventLog, Finished, Notice, Report, tee
from sidestep.files import one_writer, remove, write_text
from sidestep.settings.config import BuildDatasetConfig, DemoConfig, PreprocessConfig, SampleConfig, TrainConfig
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.sample import sample
from sidestep.tasks.train.setup import train
from sidestep.variants import CONFIG_2B, OFFICIAL_FOLDERS
from sidestep.words import side_step

EPOCHS = 20
UNFINISHED = ".unfinished"  # in a folder whose demo has not come to its end
PARTS = ("checkpoints", "songs", "tensors", "run", "samples")
OWN_SONGS = (
    ("build-dataset", "--input", "SONGS"),
    ("preprocess", "--dataset-json", "SONGS/dataset.json", "--tensor-output", "TENSORS"),
    ("train", "--dataset-dir", "TENSORS", "--output-dir", "RUN"),
    ("sample", "--adapter", "RUN/final", "--prompt", "your tag, your words"),
)  # what comes after the demo; all but the first take a checkpoint too


def demo(config: DemoConfig, report: Report) -> None:
    """The whole pipeline in `--output-dir`; a demo that did not come to its end there is made anew.

    Raises UserError when something else is there already.
    """
    home = config.output_dir
    with one_writer(home):
        if (home / UNFINISHED).exists():
            report(Notice(message="The demo that did not come to its end here is made anew."))
            for part in PARTS:
                remove(home / part)
        elif any(not path.name.startswith(".lock") for path in home.iterdir()):
            raise UserError(
                f"--output-dir {home}: not empty, and the demo overwrites nothing.",
                f"Delete it, or choose another folder: {side_step('demo', '--output-dir', f'{home}-2')}",
            )
        write_text(home / UNFINISHED, "")
        with threads_for(WIDTH):
            songs = run_pipeline(home, report)
        (home / UNFINISHED).unlink()
    listing, *others = OWN_SONGS
    report(
        Finished(
            message=f"The demo ran from {songs} songs to an adapter and a preview. Its weights are random, so it "
            "sounds like noise; your songs and the real model go the same way.",
            next_commands=(
                side_step(*listing),
                *(side_step(*words, "--checkpoint-dir", "CHECKPOINTS") for words in others),
            ),
        )
    )


def run_pipeline(home: Path, report: Report) -> int:
    """Every step from nothing to a sample, in a folder. Returns how many songs there were."""
    report(Notice(message=f"1/5 A tiny model with random weights and four short songs, in {home}"))
    checkpoints = write_tiny_checkpoint(home / "checkpoints")
    songs = write_music(home / "songs")

    report(Notice(message="2/5 build-dataset: what is known of each song"))
    dataset = home / "songs" / "dataset.json"
    build_dataset(BuildDatasetConfig(input=home / "songs", output=dataset, tag="sidestep demo"), report)

    report(Notice(message="3/5 preprocess: audio into training tensors"))
    tensors = home / "tensors"
    preprocess(
        PreprocessConfig(checkpoint_dir=checkpoints, device="cpu", dataset_json=dataset, tensor_output=tensors),
        report,
    )

    report(Notice(message="4/5 train: train a LoRA"))
    run = TrainConfig(
        checkpoint_dir=checkpoints,
        device="cpu",
        dataset_dir=tensors,
        output_dir=home / "run",
        rank=4,
        alpha=8,
        epochs=EPOCHS,
        lr=3e-3,
        log_every=5,
        save_every=EPOCHS,
    )
    log = EventLog(run.output_dir / "events.jsonl", report)
    adapter = train(run, tee(log, report)).final
    log.close()

    report(Notice(message="5/5 sample: the model without and with the adapter"))
    prompt = "sidestep demo, bright plucked arpeggios"
    sample(
        SampleConfig(
            checkpoint_dir=checkpoints,
            device="cpu",
            adapter=adapter,
            prompt=prompt,
            duration=4.0,
            output=home / "samples",
        ),
        report,
    )
    return len(songs)


# The music.
PIECE_SECONDS = 8.0
SEMITONES = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}

# name: bpm, key, chords (root and third in semitones above it), beats per note, brightness, caption, lyrics
PIECES = {
    "morning walk": (
        96,
        "C major",
        (("C", 4), ("G", 4), ("A", 3), ("F", 4)),
        0.5,
        4,
        "bright plucked arpeggios, light and friendly",
        "",
    ),
    "night drive": (
        120,
        "A minor",
        (("A", 3), ("F", 4), ("C", 4), ("G", 4)),
        0.25,
        7,
        "driving synth sequence, steady pulse",
        "",
    ),
    "slow harbour": (
        66,
        "D minor",
        (("D", 3), ("A", 3), ("D", 3), ("G", 3)),
        2.0,
        2,
        "calm organ chords, dark and wide",
        "[Verse]\nlights go out along the water\n[Chorus]\nhold the line and wait for morning",
    ),
    "paper planes": (
        140,
        "G major",
        (("G", 4), ("D", 4), ("E", 3), ("C", 4)),
        0.5,
        5,
        "fast chiptune melody with noise drums",
        "",
    ),
}


def write_music(folder: Path) -> list[Path]:
    """Write the pieces as 48 kHz stereo wav with a text file beside each, and return the audio files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (bpm, key, chords, beats, brightness, caption, lyrics) in PIECES.items():
        path = folder / f"{name}.wav"
        soundfile.write(path, piece(bpm, chords, beats, brightness).T, SAMPLE_RATE, subtype="PCM_16")
        text = f"caption: {caption}\nbpm: {bpm}\nkey: {key}\nsignature: 4/4\n"
        text += f"language: en\nlyrics:\n{lyrics}\n" if lyrics else "is_instrumental: true\n"
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def piece(bpm: int, chords: tuple[tuple[str, int], ...], beats: float, brightness: int) -> np.ndarray:
    """A bar of each chord in turn: a broken chord, its bass, a noise drum on every beat. → float32 [2, S] at 48 kHz"""
    beat = 60 / bpm
    audio = np.zeros((2, round(PIECE_SECONDS * SAMPLE_RATE)), dtype=np.float32)
    noise = np.random.default_rng(bpm)
    for number in range(int(PIECE_SECONDS / (beats * beat))):
        start = number * beats * beat
        root, third = chords[int(start / (4 * beat)) % len(chords)]
        semitone = SEMITONES[root] + (0, third, 7, 12)[number % 4]
        _add(audio, start, note(60 + semitone, 1.5 * beats * beat, brightness), pan=0.3 + 0.4 * (number % 2))
    for number in range(int(PIECE_SECONDS / beat)):
        root, _ = chords[(number // 4) % len(chords)]
        _add(audio, number * beat, 0.8 * note(36 + SEMITONES[root], beat, 2), pan=0.5)
        hit = noise.standard_normal(round(0.08 * SAMPLE_RATE)) * np.exp(-np.linspace(0, 9, round(0.08 * SAMPLE_RATE)))
        _add(audio, number * beat, 0.15 * hit, pan=0.5)
    return 0.7 * audio / np.abs(audio).max()


def note(midi: int, seconds: float, brightness: int) -> np.ndarray:
    """A decaying tone of `brightness` partials. → [S]"""
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    frequency = 440 * 2 ** ((midi - 69) / 12)
    tone = sum(np.sin(2 * np.pi * frequency * n * time) / n**1.5 for n in range(1, brightness + 1))
    return 0.3 * tone * np.exp(-3 * time / seconds) * np.minimum(time / 0.005, 1)


def _add(audio: np.ndarray, start_seconds: float, sound: np.ndarray, pan: float) -> None:
    first = round(start_seconds * SAMPLE_RATE)
    sound = sound[: audio.shape[1] - first]
    audio[0, first : first + len(sound)] += (1 - pan) * sound
    audio[1, first : first + len(sound)] += pan * sound


# The model.
END_TOKEN = "<|endoftext|>"
LATENT_CHANNELS = 8
WIDTH = 32
MODEL_SIZES = CONFIG_2B | {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "in_channels": 3 * LATENT_CHANNELS,
    "audio_acoustic_hidden_dim": LATENT_CHANNELS,
    "sliding_window": 16,
    "text_hidden_dim": WIDTH,
    "timbre_hidden_dim": LATENT_CHANNELS,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
    "num_attention_pooler_hidden_layers": 1,
    "fsq_dim": WIDTH,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "model_type": "acestep",
    "is_turbo": True,
    "model_version": "turbo",
}
SILENCE_SECONDS = 40.0


def write_tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Write VAE, text encoder and model below `folder` and return it: what `--checkpoint-dir` points at."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderOobleck(
            encoder_hidden_size=16,
            decoder_channels=8,
            decoder_input_channels=LATENT_CHANNELS,
            downsampling_ratios=[2, 4, 4, 6, 10],
            sampling_rate=SAMPLE_RATE,
        )
        vae.eval().save_pretrained(folder / "vae")
        sizes = Qwen3Config(
            vocab_size=write_tokenizer(folder / TEXT_ENCODER_FOLDER),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
        Qwen3Model(sizes).save_pretrained(folder / TEXT_ENCODER_FOLDER)
        model = folder / OFFICIAL_FOLDERS["turbo"]
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(MODEL_SIZES, indent=2), encoding="utf-8")
        parts = {
            "decoder.": AceStepTransformer1DModel,
            "encoder.": AceStepConditionEncoder,
            "tokenizer.": AceStepAudioTokenizer,
            "detokenizer.": AceStepAudioTokenDetokenizer,
        }
        tensors = {
            prefix + original_key(name): tensor.contiguous()
            for prefix, part in parts.items()
            for name, tensor in part(**accepted(part, MODEL_SIZES)).state_dict().items()
        }
        tensors["null_condition_emb"] = tensors.pop("encoder.null_condition_emb")
        del tensors["encoder.silence_latent"]  # it has a file of its own
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        silence = encode_mean(vae, torch.zeros(1, 2, round(SILENCE_SECONDS * SAMPLE_RATE)))
        torch.save(silence.transpose(1, 2).contiguous(), model / "silence_latent.pt")
    return folder


def write_tokenizer(folder: Path) -> int:
    """Write a tokenizer that knows single bytes; how many tokens that are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END_TOKEN: 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([END_TOKEN])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=END_TOKEN, eos_token=END_TOKEN)
    fast.save_pretrained(folder)
    return len(vocabulary)
