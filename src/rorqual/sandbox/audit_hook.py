"""The weaker isolation, where the system allows no namespaces: an audit hook (PEP 578) inside the interpreter.

All audit events are refused unless listed here; files may be read below the standard library, and read and written
below the working directory. This stops mistakes and simple attacks. It is NOT a security boundary: code that corrupts
memory or finds a C function without an audit event bypasses it (ctypes and other native modules are refused for that
reason). Resource limits and an empty environment apply in any case.
"""

import os
import posix
import sys

HARMLESS = frozenset({
    "compile", "exec", "import", "marshal.loads", "marshal.load", "code.__new__", "builtins.id", "builtins.input",
    "builtins.input/result", "time.sleep", "sys._getframe", "sys.excepthook", "sys.unraisablehook",
    "cpython.run_command", "object.__getattr__", "object.__setattr__", "object.__delattr__", "array.__new__",
    "re.compile", "string.Template",
})  # fmt: skip
FILES = frozenset({"open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"})
NATIVE = frozenset({"ctypes", "_ctypes", "_posixsubprocess", "subprocess", "_socket", "mmap", "_testcapi"})
# System functions that raise no audit event.
UNWATCHED = frozenset({
    "mkfifo", "mknod", "mkdirat", "setsid", "setpgid", "nice", "pidfd_open", "memfd_create", "splice", "sendfile",
    "copy_file_range", "sched_setaffinity", "sched_setscheduler", "setpriority", "umask", "chroot", "setuid",
    "unshare", "setns", "tcsetpgrp", "abort",
})  # fmt: skip


def install(work: str, library: str) -> None:
    """Refuse all events except HARMLESS ones and FILES below `work` (any use) or `library` (reading)."""
    real, isdir, join, fspath = os.path.realpath, os.path.isdir, os.path.join, os.fspath
    work, library = real(work), real(library)
    harmless, files, native = HARMLESS, FILES, NATIVE  # local: the module's names could be rebound
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def below(path: str, root: str) -> bool:
        return path == root or path.startswith(root + "/")

    def hook(event: str, args: tuple) -> None:
        if event == "import":
            if str(args[0]).partition(".")[0] not in native:
                return
        elif event in harmless:
            return
        elif event in files:
            path = args[0]
            if isinstance(path, int):  # a descriptor, which this hook allowed when it was opened
                return
            path = real(join(work, os.fsdecode(fspath(path)) if path is not None else "."))
            if event == "open" and isdir(path):  # a directory's descriptor would make later paths relative to it
                raise PermissionError(f"sandbox: {event} is not allowed")
            reading = event in ("os.listdir", "os.scandir") or (event == "open" and not args[2] & writing)
            if below(path, work) or (reading and below(path, library)):
                return
        raise PermissionError(f"sandbox: {event} is not allowed")

    for module in (os, posix):
        for name in UNWATCHED:
            module.__dict__.pop(name, None)
    sys.addaudithook(hook)
