"""After an epoch: how good the adapter is, whether it is the best so far, and whether waiting for a better one has become pointless."""

from sidestep.events import Notice, Validated
from sidestep.training.average import averaged
from sidestep.training.history import Evaluation
from sidestep.training.run import Run
from sidestep.training.validation import grid_loss


def validate(run: Run, epoch: int) -> float:
    """Loss of the held-out songs after `epoch` epochs, of the adapter and of its running average; both are kept in the history."""
    step = run.position.step
    loss, average_loss = grid_loss(run, run.held_out), None
    run.tensorboard.add_scalar("loss/validation", loss, step)
    if run.average is not None:
        with averaged(run):
            average_loss = grid_loss(run, run.held_out)
        run.tensorboard.add_scalar("loss/validation_ema", average_loss, step)
    run.history.evaluations.append(Evaluation(step, epoch, loss, average_loss))
    return loss


def judge(run: Run, epoch: int) -> bool:
    """Whether the adapter after `epoch` epochs is the best so far, by validation loss or, without held-out songs, by smoothed training loss."""
    config, history = run.config, run.history
    after = epoch > config.save_best_after
    if not run.held_out:
        loss = history.smoothed_loss()
        return loss is not None and after and history.judge(loss, run.position.step, epoch, "smoothed training loss")
    if epoch % config.validate_every and run.position.step < run.total_steps:
        return False
    loss = validate(run, epoch)
    is_best = after and history.judge(loss, run.position.step, epoch, "validation loss")
    run.report(Validated(step=run.position.step, epoch=epoch, loss=loss, best=is_best))
    return is_best


def has_waited_enough(run: Run) -> bool:
    """Whether `--early-stop-patience` epochs or validations have passed without a new best; says so."""
    best, patience = run.history.best, run.config.early_stop_patience
    if not patience or best is None or run.history.judged < patience:
        return False
    what = "validations" if run.held_out else "epochs"
    run.report(
        Notice(
            message=f"Stopped early: no lower {best.by} than {best.loss:.4f} of epoch {best.epoch} in {run.history.judged} {what} (--early-stop-patience {patience})"
        )
    )
    return True
