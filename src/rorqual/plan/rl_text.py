"""A plan of RL on this machine as text."""

from rorqual.plan.estimate import duration
from rorqual.plan.quantity import quantity
from rorqual.plan.rl_here import RLPlan
from rorqual.recipe import RLRecipe


def rl_time_text(plan: RLPlan, recipe: RLRecipe) -> str:
    """The plan's time as text."""
    low, high = plan["seconds_a_step_interval"]
    a_step = f"{plan['seconds_a_step']:.3g} s a step ({low:.3g} to {high:.3g})"
    if recipe.steps is None:
        time = f"{duration(plan['seconds'])}: about {plan['steps']:.0f} steps, {a_step}"
    else:
        short, long = plan["seconds_interval"]
        time = f"about {duration(plan['seconds'])} ({duration(short)} to {duration(long)}): {a_step}"
    if plan["evaluation_seconds"]:
        time += f", {duration(plan['evaluation_seconds'])} of evaluations"
    whole = sum(plan["parts"].values())
    shares = [f"{name.replace('_', ' ')} {value / whole:.0%}" for name, value in plan["parts"].items() if value]
    lines = [
        f"run          {quantity(plan['tokens'])} tokens, {quantity(plan['flops'], 'FLOP')}",
        f"time         {time}",
        *(f"{'':<13}{line}" for line in (", ".join(shares), *plan["assumptions"], plan["calibration"])),
    ]
    return "\n".join(lines)
