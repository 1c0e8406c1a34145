"""Errors that a user can cause, with their exit codes. One message: what, where, what to do."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 3
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: "start me again", which is how Slurm and Kubernetes files here read it


class UserError(Exception):
    """Bad input or settings, an unusable file or folder, a peer that is gone: ends with exit code 2 and no traceback."""

    exit_code = EXIT_BAD_INPUT
    prefix = "error: "  # of the message on stderr
    everywhere = False  # every rank raises it: one of each machine prints it


class DivergedError(UserError):
    """A loss or gradient that is not finite: ends with exit code 3, before anything of that step is saved."""

    exit_code = EXIT_DIVERGED
    everywhere = True


class PeerFailedError(UserError):
    """Another rank ended with an error of its own: this one ends with the same exit code, so that every node reports it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class StoppedError(UserError):
    """A signal (or a launcher that is gone) ended the work after it was saved: exit code 75, start it again. No error."""

    exit_code = EXIT_STOPPED
    prefix = ""
    everywhere = True


class LostRankError(StoppedError):
    """Ranks lost each other: likewise a reason to start again."""

    prefix, everywhere = UserError.prefix, False


@contextlib.contextmanager
def explained(before: str, *errors: type[Exception], after: str = "") -> Iterator[None]:
    """Any of `errors` inside becomes a UserError: `before`, what the library said, `after`."""
    try:
        yield
    except errors as error:
        raise UserError(f"{before}{error}{after}") from None


def one_line(error: BaseException) -> str:
    """A library's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(name: object, known: Iterable[str], or_all: bool = True) -> str:
    """The end of a message about an unknown name: `; did you mean 'x'?`; if none is near, all that are known, or nothing."""
    known = list(known)
    near = [k for k in known if k.rpartition(".")[2] == name]
    lower = {k.lower(): k for k in known}
    near += [lower[k] for k in difflib.get_close_matches(str(name).lower(), lower, n=1)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known here: {', '.join(known)}" if known and or_all else ""
