"""Where a run's rollouts come from: this process, or workers apart from it that sample ahead.

The rollout of step s is sampled from the weights after max(0, s − staleness) steps, with a seed and problems that
depend on the recipe and s alone. So neither the time that sampling takes nor a worker that is lost changes a run.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

from torch import Tensor

from rorqual.engine import Engine, SamplingParams
from rorqual.errors import UserError
from rorqual.model import Transformer
from rorqual.recipe import RLRecipe
from rorqual.rl.envs.environment import Environment, Problem
from rorqual.rl.episodes import sample_rollout
from rorqual.rl.rollout import Rollout, Shard, assemble, derived_seed, prompts_of

PREFIX = "rollouts."  # of a checkpoint's tensors


class Fleet(Protocol):
    """Workers that sample apart from the trainer."""

    staleness: int
    pushed_bytes: int  # so far, a version of the weights counted once
    notes: list[str]  # what happened to the workers, for the run's log

    def submit(
        self, step: int, version: int, model: Transformer, prompts: list[list[int]], params: SamplingParams
    ) -> None:
        """Have the rollout of `step` sampled from the weights that `model` has now, after `version` steps.

        params: with all of the end tokens in `stop_token_ids`.
        """
        ...

    def collect(self, step: int) -> list[Shard]:
        """Wait for a step's rollout, in the order of its prompts; once only."""
        ...

    def close(self) -> None:
        """End the workers, whatever they are at; once is enough."""
        ...


@dataclass(frozen=True)
class Served:
    """A rollout, and what it took to have it here."""

    rollout: Rollout
    wait_seconds: float
    staleness: int | None = None  # steps by which its weights are older; with a fleet, as the next
    pushed_bytes: int | None = None  # of weights, to the fleet


@dataclass(frozen=True)
class _Flight:
    problems: list[Problem]
    prompts: list[list[int]]
    streams: dict[str, int]  # positions before the problems were drawn


class RolloutSource:
    """Draws problems, and serves one rollout a step."""

    def __init__(
        self, recipe: RLRecipe, environments: Sequence[Environment], engine: Engine, fleet: Fleet | None = None
    ) -> None:
        """`engine` holds the sampling policy; without a fleet it samples."""
        self.recipe, self.engine, self.fleet = recipe, engine, fleet
        self.environments = {e.family: e for e in environments}
        self.streams = {e.family: e.stream("train", derived_seed(recipe.seed, e.family)) for e in environments}
        self._flights: dict[int, _Flight] = {}
        self._landed: dict[int, list[Shard]] = {}  # collected before their step, for a checkpoint

    def next(self, step: int, draw: int = 0) -> Served:
        """The rollout that step `step` trains on; a fleet first gets those of the next steps to sample meanwhile.

        draw: how many rollouts were drawn for this step before (dynamic sampling); a fleet draws once.
        """
        start = time.monotonic()
        if self.fleet is None:
            template, params = self.recipe.template, self._params(step, draw)
            rollout = sample_rollout(self.engine, self.draw(step, draw), template, params, self.environments)
            return Served(rollout, time.monotonic() - start)
        pushed = self.fleet.pushed_bytes
        self._submit_until(step, self.fleet)
        shards = self._shards(step, self.fleet)
        flight, version = self._flights.pop(step), max(0, step - self.fleet.staleness)
        del self._landed[step]
        for shard in shards:
            if int(shard.version) != version:
                raise UserError(
                    f"step {step + 1}: a worker sampled from the weights of step {int(shard.version)}, not {version}; "
                    "give every machine of the cluster the same version of rorqual"
                )
        rollout = assemble(self.engine, flight.problems, flight.prompts, shards)
        return Served(rollout, time.monotonic() - start, step - version, self.fleet.pushed_bytes - pushed)

    def close(self) -> None:
        """End the fleet: no rollout is needed any more. The problems in flight are as if they had not been drawn."""
        if self.fleet is None:
            return
        for family, index in self._first_positions().items():
            self.streams[family].index = index
        self._flights.clear()
        self._landed.clear()
        self.fleet.close()

    def take_notes(self) -> list[str]:
        """What happened to the fleet's workers since the last call."""
        notes = [] if self.fleet is None else list(self.fleet.notes)
        if self.fleet is not None:
            self.fleet.notes.clear()
        return notes

    def draw(self, step: int, draw: int = 0) -> list[Problem]:
        """The problems of a step's draw; steps and draws are drawn in order."""
        families = list(self.environments)
        weights = [self.environments[family].weight for family in families]
        chosen = Random(derived_seed(self.recipe.seed, "families", *_times(step, draw))).choices(
            families, weights, k=self.recipe.grpo.questions_per_step
        )
        return [next(self.streams[family]) for family in chosen]

    def state(self) -> dict[str, Any]:
        """The JSON part of a checkpoint: the streams' positions before the problems in flight, and their steps."""
        steps = sorted(self._flights)
        return {"streams": self._first_positions()} | ({"in_flight": steps} if steps else {})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: the rollouts in flight, from weights that are gone; waits until they are
        sampled.
        """
        return {
            f"{PREFIX}{step}.{k}.{name}": tensor
            for step in self._flights
            if self.fleet is not None
            for k, shard in enumerate(self._shards(step, self.fleet))
            for name, tensor in shard.tensors().items()
        }

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Restore what `tensors` and `state` returned."""
        for family, stream in self.streams.items():
            stream.index = state["streams"][family]
        for step in state.get("in_flight", []):
            self._draw_flight(step)
            shards: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(prefix := f"{PREFIX}{step}."):
                    k, _, field = name.removeprefix(prefix).partition(".")
                    shards.setdefault(int(k), {})[field] = tensor
            self._landed[step] = [Shard(**shards[k]) for k in range(len(shards))]

    def _submit_until(self, step: int, fleet: Fleet) -> None:
        last = step + fleet.staleness
        if self.recipe.steps is not None:
            last = min(last, self.recipe.steps - 1)
        for ahead in range(step, last + 1):
            if ahead not in self._flights:
                flight = self._draw_flight(ahead)
                params = replace(self._params(ahead), stop_token_ids=self.engine.end_tokens)
                fleet.submit(ahead, step, self.engine.model, flight.prompts, params)

    def _draw_flight(self, step: int) -> _Flight:
        streams, problems = self._positions(), self.draw(step)
        prompts = prompts_of(self.engine, problems, self.recipe.template)
        self._flights[step] = flight = _Flight(problems, prompts, streams)
        return flight

    def _shards(self, step: int, fleet: Fleet) -> list[Shard]:
        if step not in self._landed:
            self._landed[step] = fleet.collect(step)
        return self._landed[step]

    def _first_positions(self) -> dict[str, int]:
        """Of the streams, before the problems in flight."""
        return self._flights[min(self._flights)].streams if self._flights else self._positions()

    def _positions(self) -> dict[str, int]:
        return {family: stream.index for family, stream in self.streams.items()}

    def _params(self, step: int, draw: int = 0) -> SamplingParams:
        section = self.recipe.grpo
        return SamplingParams(
            temperature=section.temperature,
            top_p=section.top_p,
            top_k=section.top_k,
            min_p=section.min_p,
            max_tokens=section.max_tokens,
            n=section.group_size,
            seed=derived_seed(self.recipe.seed, "rollout", *_times(step, draw)),
            record_allowed=section.filters,
        )


def _times(step: int, draw: int) -> tuple[int, ...]:
    return (step, draw) if draw else (step,)
