"""`demo`: the whole pipeline on a tiny model and on music made here, by the functions that a user's songs pass."""

import torch

from sidestep.errors import UserError
from sidestep.events import Finished, Notice, Report
from sidestep.settings.config import BuildDatasetConfig, DemoConfig, PreprocessConfig, SampleConfig, TrainConfig
from sidestep.tasks.build_dataset import build_dataset
from sidestep.tasks.demo.music import write_music
from sidestep.tasks.demo.tiny_checkpoint import write_tiny_checkpoint
from sidestep.tasks.preprocess import preprocess
from sidestep.tasks.sample import sample
from sidestep.tasks.train import train
from sidestep.words import side_step

EPOCHS = 20
OWN_SONGS = (
    ("build-dataset", "--input", "SONGS"),
    ("preprocess", "--dataset-json", "SONGS/dataset.json", "--tensor-output", "TENSORS"),
    ("train", "--dataset-dir", "TENSORS", "--output-dir", "RUN"),
    ("sample", "--adapter", "RUN/final", "--prompt", "your tag, your words"),
)  # what comes after the demo; all but the first take a checkpoint too


def demo(config: DemoConfig, report: Report) -> None:
    """The whole pipeline in `--output-dir`. Raises UserError when something stands there already."""
    home = config.output_dir
    if home.exists() and any(home.iterdir()):
        raise UserError(
            f"--output-dir {home}: not empty, and the demo overwrites nothing.",
            f"Delete it, or choose another folder: {side_step('demo', '--output-dir', f'{home}-2')}",
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model computes faster alone than threads take to meet
    try:
        report(Notice(message=f"1/5 A tiny ACE-Step model with random weights, and four short songs, in {home}"))
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
        adapter = train(run, report).final

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
    finally:
        torch.set_num_threads(threads)
    listing, *others = OWN_SONGS
    report(
        Finished(
            message=f"The demo ran from {len(songs)} songs to an adapter and a preview. Its weights are random, so it "
            "sounds like noise; your songs and the real model go the same way:",
            next_commands=(
                side_step(*listing),
                *(side_step(*words, "--checkpoint-dir", "CHECKPOINTS") for words in others),
            ),
        )
    )
