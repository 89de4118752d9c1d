"""Nodes as network namespaces, and the wait in place of their links."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rorqual.errors import UserError
from rorqual.parallel.group import Group, Traffic
from rorqual.parallel.mesh import single

RECEIVE = """
import socket, sys
with socket.create_server(("", 29501)) as server, server.accept()[0] as connection:
    while connection.recv(1 << 16): pass
"""
SEND = """
import socket, sys, time
for _ in range(200):
    try:
        connection = socket.create_connection((sys.argv[1], 29501)); break
    except OSError:
        time.sleep(0.05)
connection.sendall(bytes(1_000_000))
"""


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import nodes

    return nodes


@pytest.fixture
def cluster(nodes):
    with nodes.Nodes(3, rate=1e8) as cluster:
        if not cluster.real:
            pytest.skip(cluster.why)
        yield cluster


def sent(cluster, node):
    """Bytes that left a node."""
    path = "/sys/class/net/eth0/statistics/tx_bytes"
    return int(subprocess.check_output(["ip", "netns", "exec", cluster._name(node), "cat", path]))


def test_nodes_reach_each_other_over_their_links_alone(cluster):
    before = [sent(cluster, node) for node in range(3)]
    cluster.start([sys.executable, "-c", RECEIVE], 2)
    cluster.start([sys.executable, "-c", SEND, cluster.address(2)], 0)
    cluster.wait(60)
    passed = [sent(cluster, node) - b for node, b in zip(range(3), before, strict=True)]
    assert 1_000_000 < passed[0] < 1_300_000
    assert max(passed[1:]) < 200_000  # acknowledgements


def test_a_node_talks_to_itself_within(cluster):
    before = sent(cluster, 1)
    cluster.start([sys.executable, "-c", RECEIVE], 1)
    cluster.start([sys.executable, "-c", SEND, cluster.address(1)], 1)
    cluster.wait(60)
    assert sent(cluster, 1) - before < 10_000


def test_a_process_that_fails_is_one_sentence(nodes):
    with nodes.Nodes(1) as cluster:
        cluster.start([sys.executable, "-c", "import time; time.sleep(1000)"], 0)
        cluster.start([sys.executable, "-c", "raise SystemExit(3)"], 0)
        with pytest.raises(UserError, match="process 1 on 1 nodes ended with status 3"):
            cluster.wait(60)


def test_what_a_killed_run_left_is_removed(nodes):
    code = "import time; from nodes import Nodes\nwith Nodes(1) as n: n.start(['sleep', '1000'], 0); time.sleep(1000)"
    left = subprocess.Popen([sys.executable, "-c", code], cwd=Path(nodes.__file__).parent)
    with nodes.Nodes(1) as cluster:
        if not cluster.real:
            left.kill()
            pytest.skip(cluster.why)
    name, sleepers = f"rorqual-{left.pid}-0", []
    while not sleepers:
        time.sleep(0.05)
        sleepers = nodes._run("ip", "netns", "pids", name).split() if name in nodes._namespaces() else []
    left.kill()
    left.wait()
    assert name in nodes._namespaces()
    with nodes.Nodes(1):
        assert name not in nodes._namespaces()
    while Path(f"/proc/{sleepers[0]}").exists():
        time.sleep(0.05)
    assert not any(maker in (left.pid, os.getpid()) for maker in nodes._namespaces().values())


@pytest.mark.parametrize(("ranks", "seconds"), [((0, 1, 2, 3), 4 * 30 * 8 * 2 / 1e4), ((0, 2), 3 * 30 * 8 * 2 / 1e4)])
def test_a_rank_waits_for_what_goes_to_other_nodes(nodes, monkeypatch, ranks, seconds):
    """30 bytes a row; places send 1, 1, 1, … rows but the last, which gets 3; a node's two ranks share 10 kb/s."""
    waits = []
    monkeypatch.setattr(nodes.time, "sleep", waits.append)
    group = Group(None, ranks, 0, 2, Traffic())
    alone = single()
    mesh = nodes.delayed(type(alone)(**{**vars(alone), "experts": group}), rate=1e4)
    send = [1] * (len(ranks) - 1) + [3]
    rows = torch.zeros(sum(send), 30, dtype=torch.uint8)
    assert mesh.experts.all_to_all(rows, send, send, "dispatch") is rows
    assert waits == [pytest.approx(seconds)]
    assert mesh.experts.traffic is group.traffic
