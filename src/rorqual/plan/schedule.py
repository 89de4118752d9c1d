"""Pipeline schedules as data: what each rank does, in order. One object is checked, simulated, drawn and executed.

A stage is a run of layers on one rank. Times below are those of one stage: F forward, B = I + W full backward (I: input
gradients only, W: weight gradients only), F&B an overlapped pair; PP is the number of stages.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, cast, get_args

from rorqual.errors import UserError

Kind = Literal["F", "B", "I", "W"]


@dataclass(frozen=True)
class Action:
    """F: forward; B: full backward; I: gradients of the inputs only; W: gradients of the weights only."""

    kind: Kind
    stage: int  # over all ranks
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} at stage {self.stage}"

    def made(self) -> tuple["Action", ...]:
        """What is there once it has run: a B makes what I and W make."""
        kinds: tuple[Kind, ...] = ("I", "W") if self.kind == "B" else (self.kind,)
        return tuple(Action(kind, self.stage, self.micro_batch) for kind in kinds)


# One action, or two that overlap: a forward and a full backward (F&B) of two micro-batches, in this order.
Step = tuple[Action, ...]


@dataclass(frozen=True)
class Schedule:
    name: str
    ranks: int
    stages: int
    micro_batches: int
    rank_of_stage: tuple[int, ...]
    steps: tuple[tuple[Step, ...], ...]  # per rank, in order

    def needs(self, action: Action) -> tuple[Action, ...]:
        """What has to be there before the action, as `Action.made` names it: an I may also come from a B."""
        kind, stage, micro_batch = action.kind, action.stage, action.micro_batch
        if kind == "F":
            return (Action("F", stage - 1, micro_batch),) if stage else ()
        if kind == "W":
            return (Action("I", stage, micro_batch),)
        forward = Action("F", stage, micro_batch)
        return (forward,) if stage == self.stages - 1 else (forward, Action("I", stage + 1, micro_batch))

    def in_order(self) -> Iterator[tuple[int, Step]]:
        """(rank, step) of all steps, each after all that it needs. Raises ValueError where ranks wait for ever."""
        there: set[Action] = set()
        done = [0] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, steps in enumerate(self.steps):
                while done[rank] < len(steps):
                    step = steps[done[rank]]
                    if not there.issuperset(need for action in step for need in self.needs(action)):
                        break
                    there.update(made for action in step for made in action.made())
                    done[rank] += 1
                    moved = True
                    yield rank, step
        stuck = []
        for rank, (steps, n) in enumerate(zip(self.steps, done, strict=True)):
            if n < len(steps):
                pairs = ((action, need) for action in steps[n] for need in self.needs(action) if need not in there)
                action, need = next(pairs)
                stuck.append(f"rank {rank} before {action} for {need}")
        if stuck:
            raise ValueError(f"{self.name}: ranks wait for ever: {', '.join(stuck)}")

    @cached_property
    def waits(self) -> tuple[tuple[int, Step, tuple[tuple[int, bool], ...]], ...]:
        """(rank, step, what it waits for) of all steps in an order in which they can run: the numbers of other steps in
        this order, and whether those are on other ranks. Raises ValueError where ranks wait for ever.
        """
        made: dict[Action, int] = {}
        found: list[tuple[int, Step, tuple[tuple[int, bool], ...]]] = []
        for rank, step in self.in_order():
            needs = (need for action in step for need in self.needs(action))
            found.append((rank, step, tuple((made[n], self.rank_of_stage[n.stage] != rank) for n in needs)))
            made |= {m: len(found) - 1 for action in step for m in action.made()}
        return tuple(found)

    def check(self) -> None:
        """Raises ValueError unless every F, and every backward (B, or I and W), is there once, on the stage's rank,
        and the ranks can run their steps in order."""
        if len(self.steps) != self.ranks or len(self.rank_of_stage) != self.stages:
            raise ValueError(f"{self.name}: {self.ranks} ranks and {self.stages} stages need as many entries")
        for rank, steps in enumerate(self.steps):
            for step in steps:
                kinds = tuple(action.kind for action in step)
                if kinds != ("F", "B") and (len(kinds) != 1 or kinds[0] not in get_args(Kind)):
                    raise ValueError(f"{self.name}: {kinds} is neither one action nor an overlapped F and B")
                for action in step:
                    if not 0 <= action.stage < self.stages or self.rank_of_stage[action.stage] != rank:
                        raise ValueError(f"{self.name}: {action} is not for rank {rank}")
        made = Counter(m for steps in self.steps for step in steps for action in step for m in action.made())
        kinds: tuple[Kind, ...] = ("F", "I", "W")
        wanted = {Action(k, s, m) for k in kinds for s in range(self.stages) for m in range(self.micro_batches)}
        for action in sorted(wanted | made.keys(), key=str):
            times = int(action in wanted)
            if made[action] != times:
                raise ValueError(f"{self.name}: {action} is there {made[action]} times instead of {times}")
        for _ in self.in_order():
            pass

    def peak_activations(self, sizes: Sequence[float] | None = None) -> tuple[float, ...]:
        """Per rank, the most activations held at once, in micro-batches × stages, from F to the end of B or W.

        An overlapped pair holds those of both its micro-batches. After I, a part of them could be freed already.
        sizes: of a micro-batch's activations at each stage, whose sums are then returned.
        """
        size = [1] * self.stages if sizes is None else sizes
        peaks = []
        for steps in self.steps:
            held = peak = 0
            for step in steps:
                held += sum(size[action.stage] for action in step if action.kind == "F")
                peak = max(peak, held)
                held -= sum(size[action.stage] for action in step if action.kind in "BW")
            peaks.append(peak)
        return tuple(peaks)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): one stage a rank; after a warm-up, a forward and a backward in turn.

    The bubble is (PP−1)(F+B) on every rank. From PP micro-batches on, rank r holds PP−r activations.
    """
    _at_least(1, "1f1b", ranks, micro_batches)
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        orders.append("F0 " * ahead + "F0 B0 " * (micro_batches - ahead) + "B0 " * ahead)
    return _written("1f1b", micro_batches, [(rank,) for rank in range(ranks)], orders)


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P, the ZB-H1 of "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241): 1F1B with B split into I and W.

    Rank r puts its W off by r micro-batches, so that each rank holds as much as 1F1B's first, PP activations. From PP
    micro-batches on, the bubble is (PP−1)(F+B−2W) on every rank if W ≤ F and W ≤ I, else longer.
    """
    _at_least(1, "zb1p", ranks, micro_batches)
    orders = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, micro_batches)
        middle = ("F0 " * (m + ahead < micro_batches) + "I0 " + "W " * (m >= rank) for m in range(micro_batches))
        orders.append("F0 " * ahead + "".join(middle) + "W " * min(rank, micro_batches))
    return _written("zb1p", micro_batches, [(rank,) for rank in range(ranks)], orders)


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV (README of DeepSeek's DualPipe, after Sea AI Lab's "Cut-in-half"): a V of PP = 2·ranks stages.

    Stages 0 … ranks−1 go down the ranks and the others back up, so that the first and the last share rank 0. In the
    middle each rank overlaps a forward of one of its stages with a backward of the other.

    If F ≤ I and W ≤ I, the bubble of the last rank, the longest, is (PP/2−1)(F&B+B−3W), else longer; each rank before
    has one more pair, hence F+B−F&B less. From PP micro-batches on, every rank holds PP+1 activations.
    Raises UserError for fewer than 2·ranks−1 micro-batches.
    """
    _at_least(2 * ranks - 1, "dualpipev", ranks, micro_batches)
    orders = []
    for rank in range(ranks):
        here, below = rank + 1, ranks - 1 - rank
        orders.append(
            "F0 " * (2 * below)
            + "F0 F1 " * here
            + "I1 W F1 " * below
            + "F0&B1 F1&B0 " * (micro_batches - 2 * below - here)
            + "B1 F1&B0 " * below
            + "I1 B0 " * here
            + "W I0 " * below
            + "W " * here
        )
    return _written("dualpipev", micro_batches, [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)], orders)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_f_one_b,
    "zb1p": zero_bubble,
    "dualpipev": dualpipe_v,
}


def _at_least(least: int, name: str, ranks: int, micro_batches: int) -> None:
    if ranks < 1:
        raise UserError(f"a pipeline of {ranks} ranks is not possible; use at least 1")
    if micro_batches < least:
        raise UserError(
            f"parallel.micro_batches is {micro_batches}, and schedule {name} on {ranks} ranks needs at least {least}; "
            f"raise it{' or choose schedule 1f1b' if least > 1 else ''}"
        )


def _written(name: str, micro_batches: int, stages: list[tuple[int, ...]], orders: list[str]) -> Schedule:
    """A schedule from the stages and the order of each rank, as `_steps` reads them."""
    rank_of_stage = {stage: rank for rank, own in enumerate(stages) for stage in own}
    in_turn = tuple(rank_of_stage[stage] for stage in range(len(rank_of_stage)))
    steps = tuple(map(_steps, stages, orders))
    return Schedule(name, len(stages), len(rank_of_stage), micro_batches, in_turn, steps)


def _steps(stages: tuple[int, ...], order: str) -> tuple[Step, ...]:
    """Steps from words: F0 is the next forward of the rank's first stage, F0&B1 an overlapped pair, W the oldest
    weight gradients that are due."""
    count: Counter[tuple[bool, int]] = Counter()  # of forwards and of backwards so far, per stage
    due: deque[Action] = deque()

    def action(word: str) -> Action:
        if word == "W":
            return due.popleft()
        kind, stage = cast(Kind, word[0]), stages[int(word[1])]
        found = Action(kind, stage, count[kind == "F", stage])
        count[kind == "F", stage] += 1
        if kind == "I":
            due.append(Action("W", stage, found.micro_batch))
        return found

    return tuple(tuple(map(action, words.split("&"))) for words in order.split())
