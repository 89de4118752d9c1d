"""`grpo.algorithm`: the fields that a published algorithm sets where a recipe does not give them (docs/rl.md).

| algorithm | source |
|---|---|
| grpo | R1 §2.1, supplement: the defaults |
| dr_grpo | Liu et al. 2025, 2503.20783, §3.2: no std, a constant in place of the length; no KL term |
| dapo | Yu et al. 2025, 2503.14476, §3: clip-higher, dynamic sampling, token average, overlong shaping; no KL term |
| gspo | Zheng et al. 2025, 2507.18071, §4.1, §5.1: length-normalised sequence ratio and its clip |
| cispo | MiniMax-M1, 2506.13585, §3.1: no lower bound; M1 gives no upper one, 5 is ScaleRL's (2510.13786) |
| opd | Agarwal et al. 2024 (GKD), 2306.13649, with student samples only: no reward |
"""

from typing import Any

GRPO_PRESETS: dict[str, dict[str, Any]] = {
    "dr_grpo": {"normalise_std": False, "average": "constant", "kl": 0.0},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "average": "token", "kl": 0.0, "max_draws": 10},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "average": "sequence", "kl": 0.0},
    "cispo": {"surrogate": "weighted", "clip_low": 1.0, "clip_high": 4.0, "average": "token", "kl": 0.0},
    "opd": {"average": "token", "kl": 0.0},
}
REWARD_PRESETS: dict[str, dict[str, Any]] = {
    "dapo": {"length": 1.0},
    "opd": {"accuracy": 0.0, "format": 0.0},
}


def with_preset(presets: dict[str, dict[str, Any]], grpo: Any, given: Any) -> Any:
    """The fields `given`, after those that the algorithm of the section `grpo` sets. What is no section stays."""
    if not (isinstance(grpo, dict) and isinstance(given, dict)):
        return given
    section: dict[str, Any] = grpo
    own: dict[str, Any] = given
    return presets.get(str(section.get("algorithm")), {}) | own
