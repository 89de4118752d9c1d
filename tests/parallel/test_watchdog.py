"""Collectives that hang on a GPU: work that does not end stands for them here, and gloo's own."""

import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers.processes import run
from rorqual.parallel import mesh, watchdog
from rorqual.parallel.group import CommunicationError, Group, Traffic
from rorqual.parallel.watchdog import UNKNOWN, Watchdog

RANKS = (0, 1, 2, 3)
SECONDS = 10  # so that there are two looks a second


def watching(rank=0, store=None):
    return Watchdog(rank, timedelta(seconds=SECONDS), store)


def begun(dog, what, step, query=None, returned=True):
    call = dog.begin(what, step, RANKS)
    call.event, call.returned = query and SimpleNamespace(query=query), returned
    return call


def looks(dog, number):
    """What each look has found."""
    return [dog.look() for _ in range(number)]


def never():
    return False


def test_work_that_does_not_end_is_found_after_the_time_out():
    dog = watching(rank=2)
    call = begun(dog, "gradients", 7, never)
    assert looks(dog, 19) == [None] * 19
    assert dog.look() is call
    said = "rank 2, step 7: gradients among ranks 0, 1, 2, 3 did not come through (nothing for 10 seconds); "
    assert dog.hanging(call) == said + UNKNOWN


def test_a_call_that_does_not_return_has_the_time_to_raise():
    dog = watching()
    call = begun(dog, "gradients", 7, returned=False)
    assert looks(dog, 79) == [None] * 79  # 10 seconds, and 30 in which gloo raises
    assert dog.look() is call


def test_the_oldest_of_those_that_hang_is_named():
    dog = watching()
    first, begun_later = begun(dog, "dispatch", 7, never), begun(dog, "combine", 7, never)
    looks(dog, 1)
    begun(dog, "losses", 8, never)
    assert looks(dog, 30)[-1] is first
    first.event = None
    assert dog.look() is begun_later


def test_a_run_whose_work_ends_is_left_alone():
    dog, ended = watching(), [False]
    for step in range(100):
        begun(dog, "gradients", step, lambda: ended[0])
        begun(dog, "losses", step)
        ended[0] = step % 15 == 0  # the GPU is behind, by as many steps
        assert dog.look() is None


def test_work_whose_gpu_has_failed_is_over():
    def query():
        raise RuntimeError("CUDA error")

    dog = watching()
    begun(dog, "gradients", 7, query)
    assert looks(dog, 40) == [None] * 40


def test_no_more_than_so_many_calls_are_kept(monkeypatch):
    monkeypatch.setattr(watchdog, "MOST", 3)
    dog = watching()
    calls = [begun(dog, str(number), 7, never) for number in range(5)]
    dog.look()
    begun(dog, "5", 7, never)
    looks(dog, 20)
    assert [call.looks for call in calls] == [21, 21, 21, 0, 0]
    for call in calls:
        call.event = None
    dog.look()
    late = begun(dog, "6", 8, never)
    assert looks(dog, 20)[-1] is late


def test_on_a_gpu_an_event_of_the_stream_says_whether_the_work_has_ended(monkeypatch):
    events = []

    class Event:
        def __init__(self):
            events.append(self)
            self.recorded = self.passed = False

        def record(self):
            self.recorded = True

        def query(self):
            return self.recorded and self.passed

    monkeypatch.setattr(torch.cuda, "Event", Event)
    dog = watching()
    group = Group(None, (0, 1), 0, 2, Traffic(step=7), dog)
    with group.named("losses"):
        pass
    assert looks(dog, 20) == [None] * 20
    assert not events  # of work on the CPU
    with group.named("gradients", on_gpu=True):
        pass
    found = looks(dog, 20)[-1]
    assert (found.what, found.step, found.ranks) == ("gradients", 7, (0, 1))
    events[0].passed = True
    assert dog.look() is None
    with group.named("weights", on_gpu=True):
        pass
    assert len(events) == 1  # it is used again


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ("weights", "; rank 2 waits for weights of step 7; rank 3 came much later or not at all: see its own output"),
        (None, "; ranks 2, 3 came much later or not at all: see their own output"),
    ],
)
def test_ranks_that_have_not_come_are_named(elsewhere, said):
    store = dist.HashStore()
    dogs = [watching(rank, store) for rank in RANKS]
    for rank in (0, 1):
        begun(dogs[rank], "gradients", 7, never)
    if elsewhere:
        begun(dogs[2], elsewhere, 7, never)
    for _ in range(20):
        found = [dog.look() for dog in dogs]
    assert dogs[0].hanging(found[0]).endswith(said)
    assert "rank 1" not in dogs[0].hanging(found[0])


def test_what_is_no_longer_waited_for_is_taken_back():
    store = dist.HashStore()
    dogs = [Watchdog(rank, timedelta(seconds=SECONDS), store) for rank in (0, 1)]
    slow = begun(dogs[1], "weights", 6, never)
    looks(dogs[1], 15)
    slow.event = None
    looks(dogs[1], 1)
    for dog in dogs:
        dog.begin("gradients", 7, (0, 1))
    found = looks(dogs[0], 80)[-1]
    assert dogs[0].hanging(found).endswith("; rank 1 came much later or not at all: see its own output")
    looks(dogs[1], 10)
    assert dogs[0].hanging(found).endswith("; all of them wait for it, so look at the links between them")


@pytest.mark.parametrize(("asked", "said"), [(15, "; all of them wait for it, "), (5, UNKNOWN)])
def test_an_error_after_a_long_wait_says_who_has_come(asked, said):
    """gloo's, which comes at once where a connection ends: others cannot have said anything then."""
    store = dist.HashStore()
    dogs = [Watchdog(rank, timedelta(seconds=SECONDS), store) for rank in (0, 1)]
    dogs[1].begin("gradients", 7, (0, 1))
    group = Group(None, (0, 1), 0, 2, Traffic(step=7), dogs[0])

    def fails():
        with group.named("gradients"):
            for dog in dogs:
                looks(dog, asked)
            raise RuntimeError("Timed out waiting 10000ms\nat a line of C++")

    with pytest.raises(CommunicationError) as e:
        fails()
    expected = "rank 0, step 7: gradients among ranks 0, 1 did not come through (Timed out waiting 10000ms); "
    assert str(e.value).startswith(expected)
    assert said in str(e.value)
    assert dogs[0].look() is None


def test_a_store_that_does_not_answer_is_not_waited_for(monkeypatch):
    class Silent:
        def set(self, key, value):
            time.sleep(60)

        def multi_get(self, keys):
            time.sleep(60)

    monkeypatch.setattr(watchdog, "STORE", 0.01)
    dog = watching(store=Silent())
    begun(dog, "gradients", 7, never)
    assert dog.hanging(looks(dog, 20)[-1]).endswith(UNKNOWN)


def alone(rank, told):
    """Rank 1 never joins a collective of gloo that was begun without waiting for it → what rank 0 is told."""
    said = []

    def end(sentence):
        said.append(sentence)
        told.touch()

    watchdog.end = end
    dog = Watchdog(rank, timedelta(seconds=1))
    dog.start()
    tensor = torch.ones(3)
    for step in range(3):
        if rank and step == 2:
            while not told.exists():
                time.sleep(0.05)
            return said
        call = dog.begin("gradients", step + 1, (0, 1))
        work = dist.all_reduce(tensor, async_op=True)
        call.event, call.returned = SimpleNamespace(query=work.is_completed), True
        if step < 2:
            work.wait()
    while not told.exists():
        time.sleep(0.05)
    return said[0]


def test_asynchronous_work_that_one_rank_does_not_join(tmp_path):
    first, second = run(2, alone, tmp_path / "told")
    assert first.startswith("rank 0, step 3: gradients among ranks 0, 1 did not come through (nothing for 1 seconds)")
    assert second == []


def test_the_process_ends_with_the_sentence():
    code = (
        "import time\nfrom types import SimpleNamespace\nfrom datetime import timedelta\n"
        "from rorqual.parallel.watchdog import Watchdog\n"
        "dog = Watchdog(0, timedelta(seconds=0.2))\ndog.start()\ncall = dog.begin('gradients', 7, (0, 1))\n"
        "call.event, call.returned = SimpleNamespace(query=lambda: False), True\ntime.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith("rorqual: rank 0, step 7: gradients among ranks 0, 1 did not come through")


def test_the_watchdog_of_pytorch_comes_after(monkeypatch):
    found = {}

    class Backend:
        def _set_default_timeout(self, timeout):
            found["nccl"] = timeout.total_seconds()

    class ProcessGroup:
        def _get_backend(self, device):
            assert device.type == "cuda"
            return Backend()

    monkeypatch.setattr(mesh, "_set_pg_timeout", lambda timeout, group: found.update(all=timeout.total_seconds()))
    mesh._set_timeout(ProcessGroup(), timedelta(seconds=600), "cpu")
    assert found == {"all": 600}
    mesh._set_timeout(ProcessGroup(), timedelta(seconds=600), "cuda")
    assert found == {"all": 600, "nccl": 660}
