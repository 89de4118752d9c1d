"""Exceptions whose messages are for the user."""

import errno
import os
import re


class UserError(Exception):
    """Invalid input: one sentence that names the file, field and value, and the remedy.

    The command line prints only the message and exits with status 2; library callers can catch it.
    """

    retry = False  # whether the same command may succeed when it is started again


class Stopped(Exception):
    """A run saved a checkpoint and ended after a signal; `exit_code` is 128 + signal number, as in shells."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "choose a writable place",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "a folder has this name; move it away",
    errno.ENOTDIR: "a file is where a folder should be; move it away",
    errno.EEXIST: "a file, or a dangling link, has this name; move it away",
    errno.ENOENT: "check that it still exists",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network drive again",
}


def file_error(path: str | os.PathLike[str], error: Exception, done: str = "written", then: str = "") -> UserError:
    """UserError for a failed file operation: the system's reason, its remedy and what to do `then`.

    done: the operation as a participle. error: an OSError, or a library's error with its code in the text
    (safetensors and tokenizers write "… (os error 28)").
    """
    code = _code(error)
    if code is None:
        reason, remedy = str(error) or type(error).__name__, "check the file and its disk"
    else:
        reason = "the disk is full" if code == errno.ENOSPC else os.strerror(code)
        remedy = REMEDIES.get(code, "check the file and its disk")
    return UserError(f"{os.fspath(path)} cannot be {done} ({reason}); {remedy}{', ' if then else ''}{then}")


def _code(error: Exception) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
