import errno
import json
import os
import sys

import pytest

from rorqual import strict_json
from rorqual.errors import file_error


class Safetensors(Exception):
    """What safetensors and tokenizers make of an OSError."""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "x.bin cannot be written (the disk is full); free space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "x.bin cannot be written (Disk quota exceeded); free space"),
        (PermissionError(errno.EACCES, "-"), "x.bin cannot be written (Permission denied); change its permissions"),
        (OSError(errno.EMFILE, "-"), "x.bin cannot be written (Too many open files); raise the limit of open files"),
        (OSError(errno.EIO, "-"), "x.bin cannot be written (Input/output error); check the disk"),
        (IsADirectoryError(errno.EISDIR, "-"), "x.bin cannot be written (Is a directory); a folder has this name"),
        (OSError(errno.EROFS, "-"), "x.bin cannot be written (Read-only file system); choose a writable place"),
        (
            Safetensors("I/O error: No space left on device (os error 28)"),
            "x.bin cannot be written (the disk is full); free space",
        ),
        (Safetensors("header too large"), "x.bin cannot be written (header too large); check the file and its disk"),
        (OSError(errno.ESTALE, "-"), f"x.bin cannot be written ({os.strerror(errno.ESTALE)}); mount the network drive"),
    ],
)
def test_an_error_is_told_with_its_own_cause(error, sentence):
    said = str(file_error("x.bin", error))
    assert said.startswith(sentence)
    assert ("free space" in said) == ("free space" in sentence)


def test_what_to_do_then():
    said = file_error("x", OSError(errno.ENOSPC, ""), "read", "then continue with --resume")
    assert str(said) == "x cannot be read (the disk is full); free space, then continue with --resume"


def test_json_has_no_number_that_is_not_finite():
    nan, inf = float("nan"), float("inf")
    text = strict_json.dumps({"a": nan, "b": [1.5, inf, {"c": (-inf, True, None, "NaN")}], "d": 3})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": "nan", "b": [1.5, "inf", {"c": ["-inf", True, None, "NaN"]}], "d": 3,
    }  # fmt: skip


def test_json_s_integers_have_no_end():
    values = (1, -2.5, sys.float_info.max, 10**400, -(10**400), float("inf"), float("nan"), True, None, "1", [1])
    assert [value for value in values if strict_json.is_finite(value)] == [1, -2.5, sys.float_info.max]
