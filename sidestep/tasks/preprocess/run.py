"""Preprocessing from end to end: see what is up to date, make the rest, wait for what others make, say the result."""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from sidestep.data.records import find_records, index_records
from sidestep.errors import Interrupted, JobError, UserError
from sidestep.events import Finished, Notice, Progress, Report
from sidestep.files import write_text
from sidestep.settings.config import PreprocessConfig, command_line
from sidestep.tasks.preprocess.first_pass import encode_songs, encode_texts
from sidestep.tasks.preprocess.job import Inspection, Job, Stage, open_job
from sidestep.tasks.preprocess.locks import remove_temporary_files
from sidestep.tasks.preprocess.passes import Results, Summary
from sidestep.tasks.preprocess.second_pass import write_records
from sidestep.tasks.preprocess.songs import Song, read_songs
from sidestep.words import count, side_step

FAILURES_NAME = "failures.json"
INSPECTORS = 8  # threads that see what each song needs
POLL_SECONDS = (0.5, 10.0)  # how often to ask whether other processes are done: at first, at last


def preprocess(config: PreprocessConfig, report: Report) -> Summary:
    """Turn songs into training records below `config.tensor_output`; a record that is up to date is left alone.

    Two passes: VAE and text encoder, one after the other, then the condition encoder. Killed at any time and started
    again it goes on where it stopped, and has lost at most one stage of the songs at hand. Other processes may work on
    the same folder (see `locks`): under torchrun or accelerate launch each takes its share, started by hand they divide
    the songs as they go; either way it returns when every song of its share is up to date or failed.

    Raises UserError for a wrong call, JobError when no song could be used or the disk is full, Interrupted at Ctrl-C.
    """
    try:
        songs = read_songs(config, report)
        job = open_job(config, report)
        rank, processes = int(os.environ.get("RANK", "0")), max(int(os.environ.get("WORLD_SIZE", "1")), 1)
        own = songs[rank::processes]
        results = Results(report, job.work)
        with job.locks:
            remove_temporary_files(config.tensor_output)
            job.work.forget_failures({song.key for song in own})
            found = inspect_all(job, own, results)
            share = f" (share {rank + 1} of {processes})" if processes > 1 else ""
            report(Notice(message=f"{count(len(found), 'song')}{share}: {what_is_left(found)}."))
            job.require_space(found)
            make(job, [(song, what) for song, what in found if what.stage != Stage.NOTHING], results)
            remove_temporary_files(config.tensor_output)
            drop_leftovers(job, own, results)
            if processes > 1:
                wait_for_ranks(job, report)
            write_failures(job, songs, results)
        job.work.remove_if_empty()
        conclude(config, songs, results.summary(), report)
        return results.summary()
    except KeyboardInterrupt:
        raise Interrupted(command_line(config)) from None


def inspect_all(job: Job, songs: Sequence[Song], results: Results) -> list[tuple[Song, Inspection]]:
    """What each song needs; those that need nothing are settled.

    Raises UserError when a record would overwrite another program's.
    """
    found = []
    with ThreadPoolExecutor(INSPECTORS, thread_name_prefix="inspect") as pool:
        for song, what in zip(songs, pool.map(job.inspect, songs), strict=True):
            found.append((song, what))
            task = "Looking for what is up to date"
            results.report(Progress(task=task, done=len(found), total=len(songs), current=song.name))
            if what.foreign:
                raise UserError(
                    f"--tensor-output {job.config.tensor_output}: {song.record.name} there was made by another program "
                    "and would be overwritten.",
                    "Give --tensor-output a folder of its own.",
                )
            if what.stage == Stage.NOTHING:
                results.up_to_date.add(song.key)
    return found


def what_is_left(found: Sequence[tuple[Song, Inspection]]) -> str:
    """How many songs are up to date, how many are to make, and what made those of before outdated."""
    ready = sum(what.stage == Stage.NOTHING for _, what in found)
    reasons = Counter(reason for _, what in found for reason in what.reasons if reason not in ("new", "interrupted"))
    redone = ", ".join(f"{reason} changed ({number})" for reason, number in reasons.most_common())
    return f"{ready} up to date, {len(found) - ready} to make" + (f"; {redone}" if redone else "")


def make(job: Job, left: list[tuple[Song, Inspection]], results: Results) -> None:
    """Make these songs, stage by stage. What other processes have is waited for, and taken over when they die."""
    task, total, free, waiting, pause = "Waiting for other processes", len(left), left, 0, POLL_SECONDS[0]
    while left:
        encode_songs(job, [(song, what) for song, what in free if what.stage == Stage.LATENTS], results)
        free = [(song, what) for song, what in free if not results.is_settled(song)]
        encode_texts(job, [song for song, what in free if what.stage >= Stage.TEXT], results)
        write_records(job, free, results)
        unsettled, left = [song for song, _ in left if not results.is_settled(song)], []
        for song in unsettled:
            what, failure = job.inspect(song), job.work.failure(song.key)
            if what.stage == Stage.NOTHING:
                results.up_to_date.add(song.key)
            elif failure:
                results.note(song, failure)
            else:
                left.append((song, what))
        free = [(song, what) for song, what in left if job.locks.is_free(song.key)]
        if left and not free:
            if not waiting:
                songs = count(len(left), "song")
                results.report(Notice(message=f"Waiting for {songs} that other processes are working on."))
            results.report(Progress(task=task, done=total - len(left), total=total, current=left[0][0].name))
            pause = min(pause * 1.5, POLL_SECONDS[1]) if len(left) == waiting else POLL_SECONDS[0]
            waiting = len(left)
            time.sleep(pause)
    if waiting:
        results.report(Progress(task=task, done=total, total=total))


def drop_leftovers(job: Job, songs: Sequence[Song], results: Results) -> None:
    """Remove what dead processes left in the work folder for songs that are up to date."""
    keys = job.work.keys()
    for song in songs:
        if song.key in keys and song.key not in results.failures and job.locks.take(song.key):
            job.work.drop(song.key)
            job.locks.release(song.key)


def wait_for_ranks(job: Job, report: Report) -> None:
    """Wait until the other ranks are done too: a status other than 0 would end them, and training wants all songs."""
    job.locks.rest()
    told = False
    while job.locks.others_at_work():
        if not told:
            report(Notice(message="This process is done; waiting for the others."))
        told = True
        time.sleep(POLL_SECONDS[0])


def write_failures(job: Job, songs: Sequence[Song], results: Results) -> None:
    """`failures.json`: every song of the job that could not be used, by all processes; no file when there is none."""
    failures = (results.failures.get(song.key) or job.work.failure(song.key) for song in songs)
    listed = [asdict(failure) for failure in failures if failure]
    path = job.config.tensor_output / FAILURES_NAME
    if listed:
        write_text(path, json.dumps({"failures": listed}, ensure_ascii=False, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def conclude(config: PreprocessConfig, songs: Sequence[Song], summary: Summary, report: Report) -> None:
    """Say what became of the songs and what to do next. Raises JobError when not one could be used."""
    output = config.tensor_output
    if summary.failed:
        message = f"{count(summary.failed, 'song')} failed; the reasons are in {output / FAILURES_NAME}."
        report(Notice(message=message, level="warning"))
    own = {song.record for song in songs}
    others = [path.relative_to(output).as_posix() for path in find_records(output) if path not in own]
    if others:
        names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        message = (
            f"{output} also holds {count(len(others), 'record')} of songs that this job does not have ({names}); "
            "training uses them too."
        )
        report(Notice(message=message, level="warning"))
    if summary.failed and not summary.done and not summary.skipped:
        raise JobError(
            f"None of {count(summary.failed, 'song')} could be preprocessed; {output / FAILURES_NAME} has the reasons.",
            "Put the files right and give the same command again.",
        )
    index_records(output, report)  # so that nobody waits for it later, and the wizard knows how much music it is
    train = side_step(
        *("train", "--checkpoint-dir", str(config.checkpoint_dir), "--model-variant", config.model_variant),
        *("--dataset-dir", str(output), "--output-dir", "OUTPUT_FOLDER"),
    )
    message = (
        f"{count(summary.done, 'song')} preprocessed, {summary.skipped} up to date already, {summary.failed} failed."
    )
    report(Finished(message=message, next_commands=(train,)))
