"""`clean`: the saved states of a run that are no longer needed. Needs no torch."""

from itertools import islice
from pathlib import Path
from typing import Any

from sidestep.errors import UserError
from sidestep.events import Finished, Report, Table
from sidestep.files import one_writer, remove
from sidestep.settings.config import CleanConfig, command_line
from sidestep.settings.path_checks import damaged_file, read_run, saved_facts
from sidestep.words import count, side_step, size


def is_whole(state: Path) -> bool:
    """Whether a saved state's bytes are those that were written."""
    facts = saved_facts(state)
    try:
        return facts is not None and not damaged_file(state, facts.get("digests", {}))
    except OSError:
        return False


def clean(config: CleanConfig, report: Report) -> dict[str, Any]:
    """{"deleted": whether, "checkpoints": folders that go, "bytes": what they hold}. `final/` and `best/` always stay.

    Of the checkpoints the newest `--keep` stay, to go on from. Raises UserError where there is no run, or where a
    process writes to it.
    """
    run = read_run(config.folder)
    if run is None:
        raise UserError(f"{config.folder}: no run there.", f"Past runs: {side_step('history', 'FOLDER')}")
    folder = config.folder / "checkpoints"
    kept = list(islice((name for name in reversed(run.checkpoints) if is_whole(folder / name)), config.keep))
    # what is newer than the oldest of these and not as it was written stays, too: it is not ours to judge
    oldest = run.checkpoints.index(kept[-1]) if kept else 0 if config.keep else len(run.checkpoints)
    gone = [folder / name for name in run.checkpoints[:oldest]]
    if not run.finished and config.keep == 0 and gone:
        raise UserError(
            f"{config.folder}: the run is not finished, and without a checkpoint it cannot go on.",
            "Keep one: leave --keep away.",
        )
    bytes_of = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in gone}
    total = sum(bytes_of.values())
    if gone:
        rows = tuple((path.name, size(number)) for path, number in bytes_of.items())
        report(Table(title=f"Checkpoints of {config.folder} that are not needed", columns=("", ""), rows=rows))
    if config.delete and gone:
        with one_writer(config.folder):
            for path in gone:
                (path / "complete.json").unlink(missing_ok=True)  # half deleted it is no checkpoint
                remove(path)
    what = f"{count(len(gone), 'checkpoint')}, {size(total)}"
    if not gone:
        message = f"Nothing to clean: {count(len(run.checkpoints), 'checkpoint')}, all to be kept."
    else:
        message = f"Deleted: {what}." if config.delete else f"Would be deleted: {what}. Nothing was changed."
    would = () if config.delete or not gone else (command_line(CleanConfig(**vars(config) | {"delete": True})),)
    report(Finished(message=message, next_commands=would))
    return {"deleted": config.delete and bool(gone), "checkpoints": [str(path) for path in gone], "bytes": total}
