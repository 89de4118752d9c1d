"""Processes that share a model's routed experts and step together (V3 §3.4: data-parallel attention).

Each process serves sequences of its own, with a KV cache of its own. Tokens travel to the experts of all processes in
every layer, so a step of one is a step of all; a process without sequences computes for the others. The front, rank 0,
takes the requests. It tells the others what is new and that a step begins, and each reports its new tokens at the end.
"""

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

from rorqual.engine.engine import Engine
from rorqual.engine.outputs import Counters, Status, TopLogprobs
from rorqual.engine.prefix_router import PrefixRouter, prefix_keys
from rorqual.engine.sampling_params import SamplingParams
from rorqual.engine.scheduler import Scheduler
from rorqual.engine.sequence import Request, Sequence
from rorqual.errors import UserError
from rorqual.parallel.expert_placement import ExpertPlacement

FRONT = 0
REPORT_SECONDS = 600.0  # for a rank to end a step that has ended here


@dataclass
class Orders:
    """What the front tells a rank before a step."""

    add: list[tuple[int, tuple[int, ...], SamplingParams, int, bool]] = field(default_factory=list)
    """Requests: number, prompt, parameters, seed and whether it is streaming."""
    cancel: list[int] = field(default_factory=list)
    reset_prefix_cache: bool = False
    rebalance: bool = False


@dataclass
class Gain:
    """What a sequence has gained in a step."""

    request: int
    index: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: str | None
    cached_tokens: int

    @classmethod
    def of(cls, number: int, sequence: Sequence, known: int) -> "Gain":
        """known: tokens reported before."""
        return cls(
            number, sequence.index, sequence.tokens[known:], sequence.logprobs[known:], sequence.top_logprobs[known:],
            sequence.finish_reason, sequence.request.cached_tokens,
        )  # fmt: skip


@dataclass
class Report:
    gains: list[Gain]
    status: Status
    arrived: list[int]  # tokens at the experts of this rank, by layer


class FrontScheduler(Scheduler):
    """Rank 0's own scheduler, which also gives requests to the schedulers of other ranks.

    Requests go where their prefix is cached, else to the rank with the fewest sequences. Structured output, texts to be
    scored and records of allowed tokens stay on rank 0: compiled grammars, hidden states and they do not travel.
    """

    placement: ExpertPlacement
    ranks: list[Connection]  # to the others, in order
    seconds: float | None  # between two placements of the experts

    def join(self, placement: ExpertPlacement, ranks: list[Connection], seconds: float | None) -> "FrontScheduler":
        """Step together with these ranks from now on."""
        self.placement, self.ranks, self.seconds = placement, ranks, seconds
        self.router: PrefixRouter[int] = PrefixRouter()
        self.orders = [Orders() for _ in ranks]
        self.reports: list[Report | None] = [None for _ in ranks]
        self.rank_of: dict[Request, int] = {}  # of requests that are not done
        self.elsewhere: dict[int, Request] = {}  # requests of other ranks, by number
        self.rebalance_due, self.placed_at = False, time.monotonic()
        return self

    @property
    def idle(self) -> bool:
        return super().idle and not self.elsewhere and not any(orders.cancel for orders in self.orders)

    def add(self, request: Request) -> None:
        self.rank_of = {r: rank for r, rank in self.rank_of.items() if not r.done}
        rank = self._choose(request)
        self.rank_of[request] = rank
        if rank == FRONT:
            super().add(request)
            return
        request.arrival = self._num_requests
        self._num_requests += 1
        self.elsewhere[request.arrival] = request
        order = request.arrival, request.prompt, request.params, request.seed, request.streaming
        self.orders[rank - 1].add.append(order)

    def _choose(self, request: Request) -> int:
        stays = request.prompt_logprobs is not None or request.grammar_state is not None
        if stays or request.params.record_allowed:
            return FRONT
        loads = dict.fromkeys(range(1 + len(self.ranks)), 0)
        for other, rank in self.rank_of.items():
            loads[rank] += other.params.n
        keys = prefix_keys(array("q", request.prompt).tobytes()) if self.blocks.prefix_cache else []
        return self.router.choose(keys, loads)

    def cancel(self, request: Request) -> None:
        if self.elsewhere.get(request.arrival) is not request:
            super().cancel(request)
            return
        del self.elsewhere[request.arrival]
        self.orders[self.rank_of[request] - 1].cancel.append(request.arrival)
        for sequence in request.sequences:
            sequence.finish_reason = sequence.finish_reason or "cancelled"

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        self.router.clear()
        for orders in self.orders:
            orders.reset_prefix_cache = True

    def step(self, before_forward: Callable[[], None] | None = None) -> list[Sequence]:
        now = time.monotonic()
        if self.seconds is not None and now - self.placed_at >= self.seconds:
            self.rebalance_due = True
        for number, orders in enumerate(self.orders, 1):
            orders.rebalance = self.rebalance_due
            with _named(number):
                self.ranks[number - 1].send(orders)
        self.orders = [Orders() for _ in self.ranks]
        if self.rebalance_due:
            self.placement.rebalance()
            self.rebalance_due, self.placed_at = False, now
        found = super().step(before_forward)
        for number, rank in enumerate(self.ranks, 1):
            report = _report(number, rank)
            self.reports[number - 1] = report
            found += [sequence for gain in report.gains if (sequence := self._gained(gain)) is not None]
        return found

    def _gained(self, gain: Gain) -> Sequence | None:
        request = self.elsewhere.get(gain.request)
        if request is None:
            return None
        request.cached_tokens = gain.cached_tokens
        sequence = request.sequences[gain.index]
        sequence.tokens += gain.tokens
        sequence.logprobs += gain.logprobs
        sequence.top_logprobs += gain.top_logprobs
        sequence.finish_reason = gain.finish_reason
        if sequence.detokenizer is not None:
            sequence.detokenizer.feed(sequence.text_tokens, gain.finish_reason is not None)
        if request.done:
            del self.elsewhere[gain.request]
        return sequence

    def status(self) -> Status:
        """Of all ranks together."""
        reports = [report for report in self.reports if report is not None]
        parts = [super().status(), *(report.status for report in reports)]
        numbers = ("running", "waiting", "blocks_used", "blocks", "kv_cache_bytes")
        totals = {name: sum(getattr(part, name) for part in parts) for name in numbers}
        counters = Counters(**{name: sum(getattr(p.counters, name) for p in parts) for name in vars(Counters())})
        return Status(**totals, counters=counters, expert_balance=self._expert_balance(reports))

    def _expert_balance(self, reports: list[Report]) -> float | None:
        if len(reports) < len(self.ranks):  # no step yet
            return None
        layers = zip(self.placement.arrived(), *(report.arrived for report in reports), strict=True)
        busiest = [max(layer) * len(layer) / sum(layer) for layer in layers if sum(layer)]
        return sum(busiest) / len(busiest) if busiest else None


@contextmanager
def _named(rank: int) -> Iterator[None]:
    """Raises UserError where a rank's connection has ended."""
    try:
        yield
    except (EOFError, OSError):
        raise UserError(f"rank {rank} has ended; its own output says why") from None


def _report(rank: int, connection: Connection) -> Report:
    """A rank's, at the end of a step. Raises UserError where it does not come."""
    with _named(rank):
        if not connection.poll(REPORT_SECONDS):
            raise UserError(f"rank {rank} hangs: it did not end its step within {REPORT_SECONDS:g} seconds")
        return connection.recv()


class Follower:
    """A rank but the first: it does what the front tells it, until the front ends."""

    def __init__(self, engine: Engine, placement: ExpertPlacement, front: Connection) -> None:
        self.engine, self.placement, self.front = engine, placement, front
        self.requests: dict[int, Request] = {}
        self.numbers: dict[Request, int] = {}
        self.known: dict[Sequence, int] = {}  # tokens reported

    def run(self) -> None:
        while True:
            try:
                orders = self.front.recv()
            except EOFError:
                return
            self.follow(orders)
            self.front.send(self.step())

    def follow(self, orders: Orders) -> None:
        if orders.reset_prefix_cache:
            self.engine.reset_prefix_cache()
        for number, prompt, params, seed, streaming in orders.add:
            request = self.engine.submit(prompt, replace(params, seed=seed), streaming)
            self.requests[number], self.numbers[request] = request, number
        for number in orders.cancel:
            if (request := self.requests.get(number)) is not None:
                self.engine.cancel(request)
                self._drop(request)
        if orders.rebalance:
            self.placement.rebalance()

    def step(self) -> Report:
        gains: list[Gain] = []
        for sequence in self.engine.step():
            request = sequence.request
            gains.append(Gain.of(self.numbers[request], sequence, self.known.get(sequence, 0)))
            self.known[sequence] = len(sequence.tokens)
        for request in [request for request in self.numbers if request.done]:
            self._drop(request)
        return Report(gains, self.engine.status(), self.placement.arrived())

    def _drop(self, request: Request) -> None:
        del self.requests[self.numbers.pop(request)]
        for sequence in request.sequences:
            self.known.pop(sequence, None)
