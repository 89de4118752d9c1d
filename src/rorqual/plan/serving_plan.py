"""Plan of a service: chips for so many users at a speed, its tokens a second, and what a million tokens cost.

Prefill and decode have chips of their own, as DeepSeek serves V3. A decode instance takes the largest batch with which
every user gets tokens fast enough and whose caches fit.
"""

import math
from dataclasses import dataclass
from typing import Any

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import calibration_of
from rorqual.plan.chips import Chip
from rorqual.plan.inference import Instance
from rorqual.plan.published_runs import Calibration
from rorqual.plan.quantity import quantity
from rorqual.plan.stage import DAY, Estimate, StagePlan

# Of the peak rate that a service keeps up all day; DeepSeek's prefill made 32.2 of 62.7 K tokens/s a node,
# decode's share is assumed.
PREFILL_LOAD, DECODE_LOAD = 0.51, 0.95
MOST_CHIPS = 256
FEWEST_EXPERTS = 2  # of a layer on a chip


@dataclass(frozen=True)
class Prices:
    """$ a million tokens."""

    hit: float
    miss: float
    output: float


@dataclass(frozen=True)
class Service:
    """What is asked about a service."""

    config: ModelConfig
    chip: Chip
    users: float | None = None  # who wait for tokens at the same time; None: as many as one instance has
    prompt: float = 2000.0
    answer: float = 500.0
    hit: float = 0.5  # share of the prompts' tokens that the prefix cache has
    speed: float = 20.0  # tokens/s of a user, at least
    weights: str = "fp8"
    cache: str = "bfloat16"
    accepted: float = 1.0  # tokens a step by speculative decoding
    price: float | None = None
    prices: Prices | None = None
    name: str = ""


@dataclass(frozen=True)
class Decode:
    instance: Instance
    batch: float  # sequences of the instance
    seconds: float  # of a step


def plan_serving(asked: Service) -> StagePlan:
    """Raises UserError where no instance holds the model, or none is fast enough."""
    fitted = calibration_of(asked.chip)
    decode, users = _best(asked, fitted)
    n, output = decode.instance.chips, users * asked.speed
    out, into = _decode_rate(asked, decode), _prefill_rate(asked, decode)
    decode_chips, prefill_chips = _busy(asked, decode, users)
    instances = math.ceil((decode_chips + prefill_chips) / n - 1e-9)
    chips = n * instances
    fullest = min(decode.batch, users / instances)
    seconds = decode.instance.decode_seconds(fullest, asked.prompt + asked.answer / 2)
    price = asked.price if asked.price is not None else asked.chip.price
    low, high = fitted.interval(DAY)
    figures = {
        "users": users,
        "tokens_per_second_user": asked.accepted / seconds,  # where no prompt is computed between
        "chips_of_an_instance": n,
        "decode": {
            "chips": decode_chips, "batch": decode.batch, "tokens_per_second_chip": out,
            "tokens_per_second_node": out * asked.chip.per_node,
        },
        "prefill": {
            "chips": prefill_chips, "tokens_per_second_chip": into,
            "tokens_per_second_node": into * asked.chip.per_node,
            "tokens_per_second_node_with_hits": into * asked.chip.per_node / (1 - asked.hit),
        },
        "cache_tokens_per_chip": decode.instance.cache_tokens() / decode.instance.chips,
    }  # fmt: skip
    if price is not None:
        figures |= _money(asked, figures, price, chips, output)
    return StagePlan(
        kind="serve",
        name=asked.name,
        config=asked.config,
        chip=asked.chip,
        chips=chips,
        price=price,
        tokens=output * DAY,
        flops_per_token=0.0,
        seconds=Estimate(DAY, low, high),
        parts={"decode": DAY * decode_chips / (decode_chips + prefill_chips),
               "prefill": DAY * prefill_chips / (decode_chips + prefill_chips)},
        memory={"weights": decode.instance.weight_bytes(),
                "KV cache": decode.batch * (asked.prompt + asked.answer) * decode.instance.cache_bytes
                / decode.instance.chips},
        assumptions=(
            f"{fitted.utilisation:.0%} of the peak in products, {fitted.source}; 80% of the memory's bandwidth",
            f"a service keeps up {PREFILL_LOAD:.0%} of the peak rate in prefill, as DeepSeek's did, and "
            f"{DECODE_LOAD:.0%} in decode, which is assumed",
            f"prompts of {asked.prompt:g} tokens, {asked.hit:.0%} of them cached, answers of {asked.answer:g}",
        ),
        figures=figures,
    )  # fmt: skip


def _decode_rate(asked: Service, decode: Decode) -> float:
    """Tokens/s of a chip, all day."""
    return decode.batch * asked.accepted / decode.seconds / decode.instance.chips * DECODE_LOAD


def _prefill_rate(asked: Service, decode: Decode) -> float:
    """Tokens/s of a chip that are not cached, all day."""
    instance, new = decode.instance, asked.prompt * (1 - asked.hit)
    return PREFILL_LOAD * new / instance.prefill_seconds(asked.prompt, asked.prompt - new) / instance.chips


def _busy(asked: Service, decode: Decode, users: float) -> tuple[float, float]:
    """Chips that decode and prefill keep busy, if all users read at the speed that is asked for."""
    output = users * asked.speed
    requests = output / asked.answer
    prefill = requests * asked.prompt * (1 - asked.hit) / _prefill_rate(asked, decode)
    return output / _decode_rate(asked, decode), prefill


def _best(asked: Service, fitted: Calibration) -> tuple[Decode, float]:
    """The size of an instance with which the users need the fewest chips, or without users the one with the most
    tokens/s a chip, and the users."""
    found: list[tuple[float, Decode, float]] = []
    fits, fastest, context = False, 0.0, asked.prompt + asked.answer / 2
    for chips in _sizes(asked):
        instance = Instance(asked.config, asked.chip, chips, asked.weights, asked.cache, fitted.utilisation)
        most = instance.cache_tokens() / (asked.prompt + asked.answer)
        if most < 1:
            continue
        fits = True
        fastest = max(fastest, asked.accepted / instance.decode_seconds(1, context))
        batch = _largest(instance, most, context, asked.accepted / asked.speed)
        if batch is None:
            continue
        decode = Decode(instance, batch, instance.decode_seconds(batch, context))
        if asked.users is None:
            found.append((-_decode_rate(asked, decode), decode, batch * DECODE_LOAD))
        else:
            instances = math.ceil(sum(_busy(asked, decode, asked.users)) / chips - 1e-9)
            found.append((instances * chips, decode, asked.users))
    if found:
        _, decode, users = min(found, key=lambda x: x[0])
        return decode, users
    if fits:
        raise UserError(
            f"--speed {asked.speed:g}: {asked.chip.name} reaches {fastest:.3g} tokens/s for one user at most; lower it"
        )
    one = Instance(asked.config, asked.chip, _sizes(asked)[-1], asked.weights, asked.cache)
    raise UserError(
        f"the model does not fit: on {one.chips} × {asked.chip.name} its weights take "
        f"{quantity(one.weight_bytes(), 'B')} of a chip's {quantity(asked.chip.memory, 'B')}; choose smaller --weights "
        "or chips with more memory"
    )


def _sizes(asked: Service) -> list[int]:
    """Numbers of chips of an instance: of a dense model within a node, of a mixture as long as each has experts."""
    if asked.config.n_routed_experts:
        most = min(MOST_CHIPS, asked.config.n_routed_experts // FEWEST_EXPERTS)
    else:
        most = asked.chip.per_node
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]


def _largest(instance: Instance, most: float, context: float, seconds: float) -> float | None:
    """The largest batch whose step takes no longer; None: not even one sequence."""
    if instance.decode_seconds(1, context) > seconds:
        return None
    low, high = 1.0, most
    if instance.decode_seconds(high, context) <= seconds:
        return high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if instance.decode_seconds(middle, context) <= seconds else (low, middle)
    return low


def _money(asked: Service, figures: dict[str, Any], price: float, chips: int, output: float) -> dict[str, float]:
    hourly = {part: price / figures[part]["tokens_per_second_chip"] / 3600 * 1e6 for part in ("decode", "prefill")}
    found = {
        "usd_per_million_output_tokens": hourly["decode"],
        "usd_per_million_input_tokens": hourly["prefill"] * (1 - asked.hit),
    }
    if asked.prices is not None:
        requests = output / asked.answer
        paid = requests * asked.prompt * (asked.hit * asked.prices.hit + (1 - asked.hit) * asked.prices.miss)
        income = (paid + output * asked.prices.output) / 1e6 * DAY
        found |= {"income_usd_a_day": income, "margin": income / (chips * 24 * price) - 1}
    return found
