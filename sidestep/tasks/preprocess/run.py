"""Preprocessing from end to end: look at what stands, make what is missing, wait for what others make, say what became of it."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from sidestep.data.records import find_records
from sidestep.errors import Interrupted, UserError
from sidestep.events import Finished, Notice, Progress, Report
from sidestep.files import write_text
from sidestep.settings.config import PreprocessConfig, command_line
from sidestep.tasks.preprocess.claims import Claims
from sidestep.tasks.preprocess.first_pass import encode_songs, encode_texts
from sidestep.tasks.preprocess.job import Inspection, Job, Need, WorkFolder, open_job, record_bytes, require, share
from sidestep.tasks.preprocess.results import Summary, Tally, require_some
from sidestep.tasks.preprocess.second_pass import write_records
from sidestep.tasks.preprocess.songs import Song, read_songs
from sidestep.words import train_py

FAILURES_NAME = "failures.json"
LOOKERS = 8  # threads that compare songs with what stands
POLL_SECONDS = (0.5, 10.0)  # how often to ask whether other processes are done: at first, at last
Found = list[tuple[Song, Inspection]]


def preprocess(config: PreprocessConfig, report: Report) -> Summary:
    """Turn songs into training records below `config.tensor_output`; what already stands and is not out of date is left alone.

    Two passes: VAE and text encoder, one after the other, then the condition encoder. Killed at any time and started again it goes on where
    it stopped. Other processes may work on the same folder: under torchrun or accelerate launch each takes its share, started by hand
    they divide the songs as they go; either way it returns when every song of its share stands or failed.

    Raises UserError for a wrong call, JobError when no song could be used or the disk is full, Interrupted after Ctrl-C.
    """
    try:
        return _preprocess(config, report)
    except KeyboardInterrupt:
        raise Interrupted(command_line(config)) from None


def _preprocess(config: PreprocessConfig, report: Report) -> Summary:
    songs = read_songs(config, report)
    job = open_job(config, report)
    rank, processes = share()
    own = songs[rank::processes]
    with Claims(job.work.folder) as claims:
        tally = Tally(report, job.work, claims)
        claims.clean(config.tensor_output)
        found = _look(job, own, tally)
        _say_what_is_left(found, tally, rank, processes)
        _require_space(job, [(song, what) for song, what in found if what.need >= Need.CONDITIONS])
        _make(job, found, tally)
        _clear_up(job, own, tally)
        if processes > 1:
            _wait_for_others(claims, report)
        write_failures(config.tensor_output, job.work, songs)
    summary = tally.summary()
    job.work.remove_if_empty()
    _finish(config, songs, summary, report)
    return require_some(summary, str(config.tensor_output / FAILURES_NAME))


def _look(job: Job, songs: Sequence[Song], tally: Tally) -> Found:
    """What each song needs; those that need nothing are settled. Raises UserError rather than overwrite what is not this job's."""
    found: Found = []
    with ThreadPoolExecutor(LOOKERS, thread_name_prefix="look") as pool:
        for done, (song, what) in enumerate(zip(songs, pool.map(job.inspect, songs), strict=True), start=1):
            tally.report(Progress(task="Comparing with what stands", done=done, total=len(songs), current=song.name))
            if what.foreign:
                raise UserError(
                    f"--tensor-output {job.config.tensor_output}: {song.record.name} there was made by another program and would be overwritten.",
                    "Give --tensor-output a folder of its own.",
                )
            if what.need == Need.NOTHING:
                tally.standing.add(song.key)
            found.append((song, what))
    return found


def _say_what_is_left(found: Found, tally: Tally, rank: int, processes: int) -> None:
    reasons = Counter(
        reason
        for _, what in found
        for reason in what.reasons
        if what.need != Need.NOTHING and reason not in ("new", "interrupted")
    )
    redone = ", ".join(f"{reason} changed ({count})" for reason, count in reasons.most_common())
    standing = sum(what.need == Need.NOTHING for _, what in found)
    of = f" (share {rank + 1} of {processes})" if processes > 1 else ""
    tally.report(
        Notice(
            message=f"{len(found)} songs{of}: {standing} stand, {len(found) - standing} to make{f'; {redone}' if redone else ''}."
        )
    )


def _require_space(job: Job, found: Found) -> None:
    """Raises JobError when the disk cannot hold what is about to be made."""
    width = int(job.checkpoint.config.get("encoder_hidden_size") or job.checkpoint.config["hidden_size"])
    needed = sum(
        record_bytes(
            seconds=what.seconds,
            frames_per_second=job.frames_per_second,
            channels=job.checkpoint.latent_channels,
            characters=len(song.lyrics) + len(song.caption),
            condition_width=width,
            with_hints=job.with_hints,
        )
        for song, what in found
    )
    require(job.config.tensor_output, needed, len(found))


def _make(job: Job, found: Found, tally: Tally) -> None:
    """Make every song that is not settled; wait for those that other processes have, and take them over if these die."""
    left = [(song, what) for song, what in found if not tally.is_settled(song)]
    mine, told, pause = left, False, POLL_SECONDS[0]
    while left:
        if mine:
            with_audio = {
                song.key
                for song in encode_songs(job, [(song, what) for song, what in mine if what.need == Need.LATENTS], tally)
            }
            texts = encode_texts(
                job, [song for song, what in mine if song.key in with_audio or what.need < Need.LATENTS], tally
            )
            write_records(job, texts, tally)
        left = [(song, what) for song, what in left if not tally.is_settled(song) and not tally.failed_elsewhere(song)]
        mine = [(song, job.inspect(song)) for song, _ in left if tally.claims.take(song.key)]
        if left and not mine:
            if not told:
                tally.report(Notice(message=f"Waiting for {len(left)} songs that other processes are working on."))
            told = True
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS[1])


def _clear_up(job: Job, songs: Sequence[Song], tally: Tally) -> None:
    """Remove what dead processes left, be it before this run or during it."""
    tally.claims.clean(job.config.tensor_output)
    left = job.work.keys()
    for song in songs:
        if song.key in left and song.key not in tally.failures and tally.claims.take(song.key):
            job.work.drop(song.key)
            tally.claims.release(song.key)


def write_failures(tensor_output: Path, work: WorkFolder, songs: Sequence[Song]) -> None:
    """`failures.json`: every song of the job that could not be used, by all processes; no file when there is none."""
    failures = [asdict(failure) for song in songs if (failure := work.failure(song.key))]
    path = tensor_output / FAILURES_NAME
    if failures:
        write_text(path, json.dumps({"failures": failures}, ensure_ascii=False, indent=2) + "\n")
    else:
        path.unlink(missing_ok=True)


def _wait_for_others(claims: Claims, report: Report) -> None:
    """Under a launcher: return when the other ranks are done too, so that a status other than 0 does not end them, and training finds all songs."""
    claims.rest()
    told = False
    while claims.others_working():
        if not told:
            report(Notice(message="This process is done; waiting for the others."))
        told = True
        time.sleep(POLL_SECONDS[0])


def _finish(config: PreprocessConfig, songs: Sequence[Song], summary: Summary, report: Report) -> None:
    if summary.failed:
        report(
            Notice(
                message=f"{summary.failed} songs failed; the reasons stand in {config.tensor_output / FAILURES_NAME}.",
                level="warning",
            )
        )
    own = {song.record for song in songs}
    others = [path for path in find_records(config.tensor_output) if path not in own]
    if others:
        names = ", ".join(path.relative_to(config.tensor_output).as_posix() for path in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        report(
            Notice(
                message=f"{config.tensor_output} also holds {len(others)} records of songs that this job does not have ({names}{more}); training uses them too.",
                level="warning",
            )
        )
    if not summary.done and not summary.skipped:
        return
    train = train_py(
        *("fixed", "--checkpoint-dir", str(config.checkpoint_dir), "--model-variant", config.model_variant),
        *("--dataset-dir", str(config.tensor_output), "--output-dir", "OUTPUT_FOLDER"),
    )
    report(
        Finished(
            message=f"{summary.done} songs preprocessed, {summary.skipped} stood already, {summary.failed} failed.",
            next_commands=(train,),
        )
    )
