"""Old names of options, recipe fields and metrics, accepted with a warning until release 0.3."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Value = TypeVar("Value")

OPTIONS = {
    "--slots": "--max-num-seqs",
    "--waiting": "--max-queue",
    "--cache-format": "--kv-cache-dtype",
    "--speculate": "--speculative",
}
VALUES = {("--speculative", "lookup"): "ngram"}
FIELDS = {  # of a section
    ("grpo", "rollout_slots"): "rollout_max_num_seqs",
    ("grpo", "drop_flat_groups"): "drop_zero_std_groups",
}
METRICS = {
    "flat_groups": "zero_std_groups",
    "solved_groups": "pass_at_g",
    "clip_share": "clip_fraction",
}


def warn(old: str, new: str) -> None:
    print(f"rorqual: {old} is now {new}; the old name goes with release 0.3", file=sys.stderr)


def current_options(words: Sequence[str]) -> list[str]:
    """A command line's words with current option names; warns of old ones."""
    found: list[str] = []
    for at, word in enumerate(words):
        if word == "--":
            return [*found, *words[at:]]
        name, sign, value = word.partition("=")
        if name in OPTIONS:
            warn(name, OPTIONS[name])
            name = OPTIONS[name]
        option = name if sign else found[-1] if found else ""
        given = value if sign else name
        if (option, given) in VALUES:
            warn(f"{option} {given}", f"{option} {VALUES[option, given]}")
            given = VALUES[option, given]
        found.append(f"{name}={given}" if sign else given)
    return found


def current_fields(raw: dict[str, Any], quiet: bool = False) -> dict[str, Any]:
    """A recipe with current field names; a field given by both names keeps the old one, which is then refused."""
    for (section, old), new in FIELDS.items():
        fields = raw.get(section)
        if isinstance(fields, dict) and old in fields and new not in fields:
            if not quiet:
                warn(f"{section}.{old}", f"{section}.{new}")
            fields[new] = fields.pop(old)
    return raw


def current_metrics(record: Mapping[str, Value]) -> dict[str, Value]:
    """A line of metrics.jsonl with current names; no warning, since old runs are valid."""
    return {METRICS.get(name, name): value for name, value in record.items()}
