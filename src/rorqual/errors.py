"""The exceptions a user is meant to see."""

import errno
import os
import re


class UserError(Exception):
    """Something the user gave is wrong: one sentence naming the file, field, value and the remedy.

    The command line prints the message alone and exits with status 2; a library caller can catch it.
    """


class Stopped(Exception):
    """A run saved and ended because a signal asked it to; `exit_code` is 128 + the signal, as shells expect."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


REMEDIES = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "a folder lies in its place; move it away",
    errno.ENOTDIR: "a file lies where a folder should be; move it away",
    errno.EEXIST: "a file, or a link that leads nowhere, lies in its place; move it away",
    errno.ENOENT: "check that it is still there",
    errno.EIO: "check the disk",
    errno.ESTALE: "mount the network drive again",
}


def file_error(path: str | os.PathLike[str], error: Exception, done: str = "written", then: str = "") -> UserError:
    """What the system said of a file, with the remedy for that cause and what to do `then`.

    error: an OSError, or what a library made of one (safetensors and tokenizers write "… (os error 28)").
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
