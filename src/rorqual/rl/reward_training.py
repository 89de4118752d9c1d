"""`rorqual reward`: from a recipe to a reward model, on pairs from a file or on such as are made now."""

import sys
from pathlib import Path

from rorqual.data.preference_pairs import read_pairs
from rorqual.data.prompts_file import read_prompts
from rorqual.data.tokenizer import load_tokenizer
from rorqual.kernels.devices import find_device
from rorqual.model import ModelConfig
from rorqual.plan.estimate import duration, plan_text
from rorqual.plan.reward_here import pair_sizes, predict_reward, sampling_seconds
from rorqual.recipe import RewardRecipe
from rorqual.rl.written_pairs import write_pairs
from rorqual.train.build_model import check_length, check_model, set_threads, tokenizer_of, trained_path
from rorqual.train.reward_run import train_reward
from rorqual.train.run_folder import open_run


def dry_run_text(recipe: RewardRecipe) -> str:
    """What `--dry-run` prints: the plan of fine-tuning on the pairs, and of sampling those of [pairs].

    Raises UserError as the run would.
    """
    set_threads(recipe.train)
    tokenizer = tokenizer_of(recipe.model)
    check_model(recipe.model)
    check_length(recipe.model, recipe.data)
    device = find_device(recipe.device)
    rows, length = pair_sizes(recipe, tokenizer)
    plan = predict_reward(ModelConfig.load(trained_path(recipe.model)), recipe, rows, length, device)
    lines = [plan_text(plan, timed=device.type == "cpu"), f"pairs        {rows}, of {length:.0f} tokens on average"]
    if recipe.pairs is not None and device.type == "cpu":
        sampler = ModelConfig.load(recipe.pairs.model)
        seconds = sampling_seconds(recipe, sampler, load_tokenizer(recipe.pairs.model))
        lines.append(f"sampling     about {duration(seconds)} before, for the answers of {recipe.pairs.model}")
    return "\n".join(lines)


def reward(recipe: RewardRecipe, resume: bool = False) -> Path:
    """Run the recipe and return the run's folder, with the released reward model in model/.

    With [pairs], pairs.jsonl is written there first. Raises UserError for what the user can fix, Stopped after SIGINT
    or SIGTERM.
    """
    set_threads(recipe.train)
    tokenizer = tokenizer_of(recipe.model)
    check_model(recipe.model)
    check_length(recipe.model, recipe.data)
    data, device = recipe.data, find_device(recipe.device)
    if recipe.pairs is not None:
        read_prompts(recipe.pairs.prompts)
    with open_run(recipe, resume, device) as run_dir:
        path = data.path
        if path is None:
            written = run_dir / "pairs.jsonl"
            if not written.exists():
                write_pairs(recipe, written, device)
            path = str(written)
        split = read_pairs(path, tokenizer, data.sequence_length, data.valid_fraction)
        if split.dropped:
            print(
                f"{path}: {split.dropped} pairs were left out, longer than data.sequence_length = "
                f"{data.sequence_length}",
                file=sys.stderr,
            )
        return train_reward(recipe, run_dir, tokenizer, split, device)
