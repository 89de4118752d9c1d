"""Child process of run_program.py: isolate itself, then exec a fresh interpreter for the program.

Started by run_program.py as `python -I -S namespaces.py MODE PYTHON LIMITS WORK READY`; standard library only, never
imported by the package. Two modes:

- `namespaces`: own mount, network, process and IPC namespaces (through a user namespace when not root). The new root
  is an empty tmpfs with the interpreter and the system libraries bound read-only: no /etc, /home, /proc or /dev
  exists, there is no network interface, and the program runs as nobody without capabilities.
- `guard`: the audit hook of audit_hook.py, for systems without namespaces. Weaker: see there.

Both add resource limits. READY is written just before exec; without it, the program did not run.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NOBODY = 65534
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SYS_MOUNT_SETATTR, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, 0x8000, 1

# stdin holds the word to print when the program ran to its end, then the program, which must not be able to read it.
BOOT = """
def boot():
    import os, sys
    done = sys.stdin.buffer.readline()
    source = sys.stdin.buffer.read()
    sys.stdin.close()
    if len(sys.argv) > 1:
        guard = {}
        exec(compile(sys.argv[1], "audit_hook.py", "exec"), guard)
        guard["install"](os.getcwd(), os.path.dirname(os.__file__))
    sys.argv = [""]
    write, flush = os.write, sys.stdout.flush
    exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    flush()
    write(1, done)
boot()
"""


def call(name: str, *args: object) -> None:
    """Call a libc function; raises OSError when it does not return 0."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def enter_namespaces(base: str, work_bytes: int) -> None:
    """Detach from the host's files, network and processes; the working directory becomes a private tmpfs."""
    own = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        call("unshare", own)
    else:
        call("unshare", own | CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    place = "/mnt" if os.path.isdir("/mnt") and not base.startswith("/mnt/") else "/tmp"
    options = f"size={work_bytes},nr_inodes=4096,mode=755".encode()
    call("mount", b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in sorted(["/lib", "/lib64", "/usr/lib", "/usr/lib64", base], key=len):  # outer before inner
        bind(path, f"{place}/box")
    os.mkdir(f"{place}/box/tmp")
    os.chmod(f"{place}/box/tmp", 0o1777)
    os.chdir(place)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chroot("/box")  # in a chroot the kernel refuses new user namespaces, which would give capabilities
    os.chdir("/tmp")


def bind(path: str, root: str) -> None:
    """Bind-mount `path` at the same place below `root`, read-only, with its submounts."""
    target = root + path
    if os.path.lexists(target) or not os.path.lexists(path):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    os.mkdir(target)
    call("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", SYS_MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, ctypes.byref(attributes), size)


def become_first_process() -> None:
    """Fork twice: the first child is PID 1 of the namespace, whose exit kills all others; returns in the second."""
    for _ in range(2):
        child = os.fork()
        if child:
            while True:
                pid, status = os.wait()
                if pid == child:
                    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
        call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def drop_privileges() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform == "linux":
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit_resources(limits: dict[str, int]) -> None:
    for name, value in (
        ("AS", limits["memory_bytes"]),
        ("FSIZE", limits["file_bytes"]),
        ("NOFILE", 32),
        ("NPROC", 1),  # this process counts: no other process or thread can be started
        ("CORE", 0),
        ("CPU", limits["cpu_seconds"]),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def main() -> None:
    mode, python, limits_text, work, ready = sys.argv[1:]
    limits = json.loads(limits_text)
    # Not -I, which ignores PYTHONHASHSEED too: with it, sets have the same order each time.
    command = [python, "-P", "-s", "-S", "-c", BOOT]
    if mode == "namespaces":
        enter_namespaces(sys.base_prefix, limits["file_bytes"])
        become_first_process()
    else:
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "audit_hook.py")) as f:
            command.append(f.read())
        os.chdir(work)
        if os.geteuid() == 0:
            os.chown(work, NOBODY, NOBODY)
    drop_privileges()
    os.closerange(3, 1024)
    limit_resources(limits)
    if not os.access(python, os.X_OK):
        raise PermissionError(f"{python} cannot be run as an unprivileged user")
    os.write(1, ready.encode() + b"\n")
    os.execve(python, command, {"PYTHONHASHSEED": "0"})


main()
