"""The largest compute-optimal training that a budget or a number of days pays for.

Model and data grow together by the law of DeepSeek LLM (arXiv 2401.02954, §3.2): M = 0.1715 · C^0.5243 FLOPs a token
without the vocabulary, on C / M tokens. It was found on dense models; mixtures are taken by what a token activates.
"""

import math
from dataclasses import replace

from rorqual.errors import UserError
from rorqual.model.config import ModelConfig
from rorqual.plan.calibrations import HERE
from rorqual.plan.cost import flops_by_layer
from rorqual.plan.stage import DAY, HOUR, StagePlan
from rorqual.plan.training_plan import Question, plan_training

MODEL_SCALE, MODEL_EXPONENT = 0.1715, 0.5243
HEAD = 128  # width of an attention head, and of the model for each of its layers
VOCABULARY = 65536
WIDEST = 256  # heads
SAME = 1e-3  # relative difference of money or time


def sized(shape: str, heads: int) -> ModelConfig:
    """A model of the family: Llama's, or a mixture with DeepSeek-V2-Lite's proportions, 128 wide for each head."""
    width = HEAD * heads
    if shape == "dense":
        return ModelConfig(
            model_type="llama", vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=max(2, heads),
            intermediate_size=256 * round(8 / 3 * width / 256), num_attention_heads=heads, head_dim=HEAD,
            num_key_value_heads=next(n for n in range(math.ceil(heads / 4), heads + 1) if heads % n == 0),
        )  # fmt: skip
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=max(3, heads),
        intermediate_size=64 * round(5.34 * width / 64), num_attention_heads=heads, kv_lora_rank=min(512, 32 * heads),
        q_lora_rank=None, qk_nope_head_dim=HEAD, qk_rope_head_dim=64, v_head_dim=HEAD, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, moe_intermediate_size=64 * round(0.6875 * width / 64),
        first_k_dense_replace=1, num_nextn_predict_layers=0,
    )  # fmt: skip


def optimal_tokens(config: ModelConfig, length: int) -> float:
    """Tokens for which the model has the best size."""
    a_token = 3 * sum(f.forward for f in flops_by_layer(config, length))
    return (a_token / MODEL_SCALE) ** (1 / MODEL_EXPONENT) / a_token


def largest_within(asked: Question, shape: str, budget: float | None) -> StagePlan:
    """The widest model of the family whose optimal training costs no more. `asked.config` and `.tokens` are found.

    Raises UserError where not even the smallest is paid for.
    """
    asked = replace(asked, chips=chips_within(asked, budget))

    def plan(heads: int) -> StagePlan | None:
        """None: too dear, too slow, or too large."""
        config = sized(shape, heads)
        question = replace(asked, config=config, tokens=optimal_tokens(config, asked.length), days=None)
        try:
            found = plan_training(question)
        except UserError:
            return None
        return found if share_used(found, budget, asked.days) <= 1 else None

    best, low, high = plan(1), 1, WIDEST
    if best is None:
        raise UserError(f"{_limits(budget, asked.days)}: too little for a model of 128 wide; allow more")
    while high - low > 1:
        middle = (low + high) // 2
        found = plan(middle)
        best, low, high = (found, middle, high) if found else (best, low, middle)
    # The rest goes into more tokens: the next model of the family costs more.
    found = tokens_within(replace(asked, config=best.config, tokens=best.tokens), budget)
    law = optimal_tokens(best.config, asked.length)
    return replace(
        found,
        name=asked.name or f"{shape}, {HEAD * low} wide",
        assumptions=(
            f"the largest compute-optimal model by DeepSeek LLM's law (arXiv 2401.02954, §3.2), which trains it on "
            f"{law / 1e9:.3g} G tokens; a smaller one trained for longer costs less to serve",
            *found.assumptions,
        ),
        figures=found.figures | {"compute_optimal_tokens": law, "config": best.config.to_dict()},
    )


def tokens_within(asked: Question, budget: float | None) -> StagePlan:
    """The plan with as many tokens as money and days allow; `asked.tokens` is where the search starts.

    Raises UserError where nothing fits.
    """
    question = replace(asked, chips=chips_within(asked, budget), days=None)
    found = plan_training(question)
    for _ in range(12):
        used = share_used(found, budget, asked.days)
        if 1 - SAME <= used <= 1:
            break
        # A larger run takes larger steps, so a time is not quite proportional to tokens.
        question = replace(question, tokens=max(1.0, question.tokens / used * (1 - SAME / 2)))
        found = plan_training(question)
    return found


def share_used(plan: StagePlan, budget: float | None, days: float | None) -> float:
    """Of what may be spent."""
    shares = []
    if budget is not None:
        if not plan.cost:
            raise UserError("--budget: an hour of the chip has no price; say it with --price")
        shares.append(plan.cost.value / budget)
    if days is not None:
        shares.append(plan.seconds.value / DAY / days)
    return max(shares)


def chips_within(asked: Question, budget: float | None) -> int | None:
    """As asked; with both limits enough to spend the one within the other; else one node. Raises UserError."""
    if asked.chips is not None or asked.chip.family == HERE:
        return asked.chips or 1
    price = asked.price if asked.price is not None else asked.chip.price
    if budget is not None and asked.days is not None and price:
        needed = budget / (price * asked.days * DAY / HOUR)
        return 1 << max(0, math.ceil(math.log2(needed)))
    return asked.chip.per_node


def _limits(budget: float | None, days: float | None) -> str:
    return " ".join(f"--{name} {value:g}" for name, value in (("budget", budget), ("days", days)) if value is not None)
