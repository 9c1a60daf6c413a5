"""The two errors that carry meaning across the project.

Everything else that is raised is a defect and keeps its traceback.
"""


class UserError(Exception):
    """Bad input. The message is one line that names the value, what is allowed, and the fix.

    Commands print it without a traceback and leave with exit code 2. What a value holds that cannot be printed (a line
    break, a terminal's escape) is spelled out.
    """

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


class TrialFailed(Exception):
    """One trial cannot go on (a loss that is not a number, for instance). The message is the reason.

    The study goes on without it; the reason is kept with the trial.
    """
