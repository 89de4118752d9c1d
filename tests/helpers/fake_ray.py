"""What rl/ray_rollouts.py uses of Ray, in this process: calls run when they are waited for, and fail as told."""

import copy
import types

import numpy as np


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Ref:
    def __init__(self, call):
        self.call, self.found = call, None

    def value(self):
        if self.found is None:
            self.found = self.call()
        return self.found


class FakeRay:
    exceptions = types.SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, faults=None, cpus=(2,), gpus=None):
        """faults: number of a call of `sample`, counted from 0 → "dies" or "hangs". cpus, gpus: of each machine, the
        first of which is this one.
        """
        self.faults, self.cpus, self.gpus = faults or {}, cpus, gpus or [0] * len(cpus)
        self.needs = []  # of each worker
        self.calls = self.sampled = self.started = self.killed = 0
        self.crossed = []  # what is sent to workers and comes back

    def nodes(self):
        return [
            {"Alive": True, "NodeID": str(i), "Resources": {"CPU": float(n)} | ({"GPU": float(g)} if g else {})}
            for i, (n, g) in enumerate(zip(self.cpus, self.gpus, strict=True))
        ]

    def cluster_resources(self):
        return {"CPU": float(sum(self.cpus)), "GPU": float(sum(self.gpus))}

    def get_runtime_context(self):
        return types.SimpleNamespace(get_node_id=lambda: "0")

    def remote(self, **options):
        self.needs.append(options)
        return lambda cls: types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._start(cls)))

    def put(self, value):
        kept = copy.deepcopy(value)  # the weights are trained on
        self.crossed.append(kept)
        return Ref(lambda: kept)

    def get(self, ref):
        return ref.value()

    def wait(self, refs, timeout):
        ready = [ref for ref in refs if ref.call != "hangs"][:1]
        return ready, [ref for ref in refs if ref not in ready]

    def kill(self, actor, no_restart):
        self.killed += 1
        actor.dead = True

    def _start(self, cls):
        def start(*args):
            self.started += 1
            worker = cls(*args)
            return types.SimpleNamespace(
                dead=False,
                sample=types.SimpleNamespace(remote=lambda *args: self._sample(worker, args)),
                forwards=types.SimpleNamespace(
                    options=lambda **_: types.SimpleNamespace(remote=lambda: Ref(worker.forwards))
                ),
            )

        return start

    def _sample(self, worker, args):
        number, self.calls = self.calls, self.calls + 1

        def call():
            if self.faults.get(number) == "dies":
                raise RayError("The actor died\n in many words")
            try:
                found = worker.sample(*(arg.value() if isinstance(arg, Ref) else arg for arg in args))
            except Exception as e:
                raise RayTaskError(e) from e
            self.sampled += 1
            self.crossed += [*(arg for arg in args if not isinstance(arg, Ref)), found]
            return found

        return Ref("hangs" if self.faults.get(number) == "hangs" else call)


def plain(value):
    """Whether it consists of numbers, text and arrays."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return isinstance(value, int | float | str | bool | np.ndarray) or value is None
