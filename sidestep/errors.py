"""The one error a user is meant to read, and what exit statuses mean."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FAILED = 1  # the job did not do what was asked
    USAGE = 2  # the call itself was wrong; nothing was started
    SOME_FAILED = 3  # the job was done, but for the files it names
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; what was done is saved


class UserError(Exception):
    """Something the user can put right.

    `problem` names the value and the flag, `fix` the command or the change that helps.
    """

    def __init__(self, problem: str, fix: str = "", status: ExitStatus = ExitStatus.USAGE):
        super().__init__(f"{problem}\n{fix}" if fix else problem)
        self.problem, self.fix, self.status = problem, fix, status

    def __reduce__(self):
        return type(self), (self.problem, self.fix, self.status)


class JobError(UserError):
    """A job that started and could not finish: exit status 1 instead of 2."""

    def __init__(self, problem: str, fix: str = "", status: ExitStatus = ExitStatus.FAILED):
        super().__init__(problem, fix, status)


class Interrupted(Exception):
    """The user stopped the job; the work so far is saved. `resume` is the command that goes on."""

    def __init__(self, resume: str = ""):
        super().__init__(resume)
        self.resume = resume
