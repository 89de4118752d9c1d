import functools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest

from rorqual.errors import UserError
from rorqual.sandbox import run_program as sandbox
from rorqual.sandbox.run_program import Limits, run_program

QUICK = Limits(wall_seconds=1.5, cpu_seconds=1, memory_bytes=256 * 2**20, output_bytes=10_000)


def modes() -> list[str]:
    """The modes this machine can establish; each must hold all that follows."""
    found = []
    for mode in sandbox.MODES:
        try:
            if sandbox.probe(mode).passed:
                found.append(mode)
        except (OSError, RuntimeError):
            continue
    return found


@pytest.fixture(params=sandbox.MODES)
def run(request):
    if request.param not in modes():
        pytest.skip(f"{request.param}: not available to this user on this system")
    return lambda source, limits=QUICK: run_program(source, limits, request.param)


def test_a_program_that_ends_passes_and_its_output_is_kept(run):
    outcome = run("import math, re, collections, heapq\nprint(math.gcd(12, 18))")
    assert (outcome.status, outcome.detail) == ("passed", "6\n")


@pytest.mark.parametrize(
    "source", ["1/0", "import sys; sys.exit(0)", "import os; os._exit(0)", "assert False", "syntax("]
)
def test_a_program_that_does_not_reach_its_end_fails(run, source):
    assert run(source).status == "failed"


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(60)", "10**10**8"])
def test_endless_programs_are_stopped(run, source):
    started = time.monotonic()
    assert run(source).status in ("timeout", "failed")
    assert time.monotonic() - started < 4


def test_hidden_output_does_not_hide_a_running_program(run):
    assert run("import os\nos.close(1); os.close(2)\nwhile True: pass").status == "timeout"


def test_memory_is_bounded(run):
    outcome = run("x = 'a' * 10**9")
    assert outcome.status == "failed"
    assert "MemoryError" in outcome.detail


def test_a_fork_bomb_starts_nothing(run):
    outcome = run("import os\nwhile True: os.fork()")
    assert outcome.status == "failed"
    assert "BlockingIOError" in outcome.detail or "PermissionError" in outcome.detail
    assert run("import threading\nthreading.Thread(target=print).start()").status == "failed"


def test_output_is_bounded(run):
    outcome = run("while True: print('x' * 1000)")
    assert outcome.status == "output"
    assert len(outcome.detail) <= 2000


@pytest.fixture
def open_directory():
    """A directory that permissions let anyone use, so that only the isolation can refuse."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


def test_files_outside_can_be_neither_read_nor_written(run, open_directory):
    secret = open_directory / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    assert run(f"open({str(secret)!r}).read()").status == "failed"
    assert run(f"open({str(secret)!r}, 'w').write('x')").status == "failed"
    assert run(f"open({str(open_directory / 'new')!r}, 'w').write('x')").status == "failed"
    assert run(f"import os; os.symlink({str(secret)!r}, 'link'); open('link').read()").status == "failed"
    assert secret.read_text() == "secret"
    assert [p.name for p in open_directory.iterdir()] == ["secret"]


@pytest.mark.parametrize("path", ["/etc/passwd", os.path.expanduser("~"), "/proc/self/environ", __file__])
def test_the_users_files_are_not_there(run, path):
    reading = f"os.listdir({path!r})[0]" if os.path.isdir(path) else f"open({path!r}).read()[0]"
    program = f"import os\ntry: found = {reading}\nexcept (OSError, IndexError): pass\nelse: print('READ', found)"
    outcome = run(program)
    if path == os.path.expanduser("~") and sys.base_prefix.startswith(path):
        # The interpreter itself lies in the home directory: only the way to it may be visible.
        top = Path(sys.base_prefix).relative_to(path).parts[0]
        assert outcome.detail in ("", f"READ {top}\n")
    else:
        assert outcome.status == "passed"
        assert "READ" not in outcome.detail


def test_own_files_work_and_are_bounded(run):
    assert run("open('a', 'w').write('hi'); assert open('a').read() == 'hi'").passed
    assert run("open('a', 'wb').write(b'x' * 10**8)").status == "failed"


def test_the_interpreter_cannot_be_altered(run):
    assert run("import os; open(os.__file__, 'a').write('#')").status == "failed"


def test_the_network_is_out_of_reach(run):
    with sandbox.socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)").status == "failed"
    assert run("import socket; socket.create_connection(('1.1.1.1', 53), 1)").status == "failed"


def test_the_parent_cannot_be_killed(run):
    run("import os, signal\nfor pid in (os.getppid(), 1): os.kill(pid, signal.SIGKILL)")
    run(f"import os, signal; os.kill({os.getpid()}, signal.SIGKILL)")
    assert run("print(1)").passed


def test_nothing_of_the_environment_is_inherited(run, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    assert run("import os; assert 'API_KEY' not in os.environ").passed


def test_nothing_is_left_running(run):
    children = functools.partial(psutil.Process().children, recursive=True)
    before = children()  # of other tests in this process
    seen: list[psutil.Process] = []
    watch = threading.Timer(0.6, lambda: seen.extend(set(children()) - set(before)))
    watch.start()
    run("import os\ntry: os.setsid()\nexcept AttributeError: pass\nwhile True: pass")
    assert seen
    assert psutil.wait_procs(seen, timeout=2)[1] == []


def test_privileges_cannot_be_regained(run):
    source = "import ctypes; libc = ctypes.CDLL(None); assert libc.unshare(0x10000000) == 0 or libc.setuid(0) == 0"
    assert run(source).status == "failed"


def test_nothing_runs_where_isolation_cannot_be_established(monkeypatch, tmp_path):
    broken = tmp_path / "namespaces.py"
    broken.write_text("raise OSError('unshare: Operation not permitted')")
    monkeypatch.setattr(sandbox, "CHILD", broken)
    sandbox.isolation.cache_clear()
    try:
        with pytest.raises(UserError, match=r"cannot be isolated here \(namespaces: .*not permitted.*so it is not run"):
            run_program("print(1)")
    finally:
        sandbox.isolation.cache_clear()


def test_a_jail_that_lets_the_probe_out_is_not_used(monkeypatch, tmp_path):
    leaky = tmp_path / "namespaces.py"
    leaky.write_text(
        "import sys\nprint(sys.argv[5], flush=True)\ndone = sys.stdin.readline()\nexec(sys.stdin.read())\nprint(done)"
    )
    monkeypatch.setattr(sandbox, "CHILD", leaky)
    sandbox.isolation.cache_clear()
    try:
        with pytest.raises(UserError, match="a file outside can be read"):
            run_program("print(1)")
    finally:
        sandbox.isolation.cache_clear()


def test_a_fault_while_setting_up_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path):
    sandbox.isolation()
    broken = tmp_path / "namespaces.py"
    broken.write_text("raise OSError('mount: no space')")
    monkeypatch.setattr(sandbox, "CHILD", broken)
    with pytest.raises(UserError, match="mount: no space"):
        run_program("print(1)")


GUARDED = """
import sys
exec(compile(open({guard!r}).read(), "audit_hook.py", "exec"), space := {{}})
import os
space["install"](os.getcwd(), os.path.dirname(os.__file__))
{source}
print("DONE")
"""


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("import json, re, dataclasses, decimal; print(json.dumps([1]))", True),
        ("open('a', 'w').write('hi'); print(open('a').read(), os.listdir())", True),
        ("open('/etc/passwd').read()", False),
        ("os.open('/', 0)", False),
        ("open(os.__file__, 'a')", False),
        ("os.listdir('/')", False),
        ("os.system('true')", False),
        ("os.fork()", False),
        ("os.kill(0, 0)", False),
        ("os.symlink('/etc/passwd', 'link')", False),
        ("os.mkfifo('/tmp/fifo')", False),
        ("import socket", False),
        ("import ctypes", False),
        ("import subprocess", False),
        ("import gc; gc.get_objects()", False),
    ],
)
def test_the_guard_alone(tmp_path, source, allowed):
    """Harmless attempts, in a process with nothing but the hook: what holds where there are no namespaces."""
    guard = str(sandbox.CHILD.with_name("audit_hook.py"))
    program = GUARDED.format(guard=guard, source=source)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ("DONE" in done.stdout) == allowed, done.stderr
    if not allowed:
        assert "sandbox:" in done.stderr or "AttributeError" in done.stderr
