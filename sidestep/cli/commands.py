"""One function per command: it imports its task, runs it with a config, and says with which status it ended.

The imports stand inside the functions so that help and the wizard start without torch.
"""

from collections.abc import Callable
from typing import Any

from sidestep.config import BuildDatasetConfig, DemoConfig, PreprocessConfig, SampleConfig, TrainConfig
from sidestep.errors import ExitStatus
from sidestep.events import Report


def preprocess(config: PreprocessConfig, report: Report) -> ExitStatus:
    """`fixed --preprocess`. Nothing preprocessed is a failure; some songs left out have a status of their own."""
    from sidestep.preprocess import preprocess

    summary = preprocess(config, report)
    if not summary.failed:
        return ExitStatus.OK
    return ExitStatus.SOME_FAILED if summary.done or summary.skipped else ExitStatus.FAILED


def train(config: TrainConfig, report: Report) -> ExitStatus:
    """`fixed`."""
    from sidestep.training import train

    train(config, report)
    return ExitStatus.OK


def build_dataset(config: BuildDatasetConfig, report: Report) -> ExitStatus:
    """`build-dataset`."""
    from sidestep.build_dataset import build_dataset

    build_dataset(config, report)
    return ExitStatus.OK


def sample(config: SampleConfig, report: Report) -> ExitStatus:
    """`sample`."""
    from sidestep.sample import sample

    sample(config, report)
    return ExitStatus.OK


def demo(config: DemoConfig, report: Report) -> ExitStatus:
    """`demo`."""
    from sidestep.demo import demo

    demo(config, report)
    return ExitStatus.OK


RUN: dict[type, Callable[[Any, Report], ExitStatus]] = {
    PreprocessConfig: preprocess,
    TrainConfig: train,
    BuildDatasetConfig: build_dataset,
    SampleConfig: sample,
    DemoConfig: demo,
}
