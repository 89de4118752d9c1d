"""Predict the cost of a reward model on this machine: as fine-tuning on its pairs, and the sampling that makes them."""

import torch

from rorqual.data.corpus import RECORDS, find_files, read_records
from rorqual.data.preference_pairs import ConversationEncoder, read_pairs
from rorqual.data.prompts_file import read_prompts
from rorqual.kernels.dtypes import compute_dtype
from rorqual.model.config import ModelConfig
from rorqual.plan.engine_time import decode_counts, engine_costs_here, prefill_counts
from rorqual.plan.estimate import Plan, predict
from rorqual.plan.rl_plan import Lengths, writing_seconds
from rorqual.recipe import ChatDataSection, RewardRecipe, SFTRecipe
from rorqual.tokenizer_protocol import Tokenizer

MEAN_ANSWER = 0.7  # of max_tokens, where answers are not written yet
CHARACTERS = 4  # of a token, where the tokenizer is not written yet
AT_ONCE = 32  # prompts of a sampling call
TWIN_LENGTH = 0.9  # of an answer's: some are cut off, some repeat


def as_sft(recipe: RewardRecipe, length: float) -> SFTRecipe:
    """The fine-tuning that costs the same: a pair is a sequence of `length` tokens, its two conversations."""
    return SFTRecipe(
        name=recipe.name, out=recipe.out, seed=recipe.seed, device=recipe.device, model=recipe.model,
        precision=recipe.precision, recompute=recipe.recompute,
        data=ChatDataSection(path="pairs", sequence_length=max(2, round(length))),
        optimizer=recipe.optimizer, schedule=recipe.schedule, train=recipe.train,
    )  # fmt: skip


def predict_reward(
    config: ModelConfig, recipe: RewardRecipe, rows: int, length: float, device: torch.device | str = "cpu"
) -> Plan:
    """rows: training pairs; length: mean tokens of one. Without the sampling of [pairs]."""
    whole = config.replace(tie_word_embeddings=True, num_nextn_predict_layers=0)
    return predict(whole, as_sft(recipe, length), rows, device, whole.replace(vocab_size=1))


def pair_sizes(recipe: RewardRecipe, tokenizer: Tokenizer | None) -> tuple[int, float]:
    """(training pairs, mean tokens of one); of [pairs], whose answers are not written yet, a guess.

    tokenizer: None where it is not written yet. Raises UserError.
    """
    data, section = recipe.data, recipe.pairs
    if section is None:
        assert data.path is not None
        if tokenizer is None:
            count = sum(1 for file in find_files(data.path, RECORDS) for _ in read_records(file))
            return max(1, round(count * (1 - data.valid_fraction))), float(data.sequence_length)
        train = read_pairs(data.path, tokenizer, data.sequence_length, data.valid_fraction).train
        return len(train), float(train.sizes.mean())
    prompts = read_prompts(section.prompts)
    answer = MEAN_ANSWER * section.max_tokens
    rows = max(1, round(len(prompts) * section.twins * (1 - data.valid_fraction)))
    return rows, 2 * _prompt_tokens(prompts, tokenizer) + answer * (1 + TWIN_LENGTH)


def sampling_seconds(recipe: RewardRecipe, config: ModelConfig, tokenizer: Tokenizer | None) -> float:
    """Of the answers of [pairs], two a prompt, by a model of these sizes."""
    section = recipe.pairs
    if section is None:
        return 0.0
    prompts = read_prompts(section.prompts)
    engine = engine_costs_here(compute_dtype("auto"))
    lengths = Lengths(_prompt_tokens(prompts, tokenizer), MEAN_ANSWER * section.max_tokens, section.max_tokens)
    answers = 2.0 * len(prompts)

    def decode(batch: float, context: float) -> float:
        return engine.seconds(decode_counts(config, batch, context))

    at_once = min(answers, 2.0 * AT_ONCE)
    prefill = engine.seconds(prefill_counts(config, answers, lengths.prompt, answers))
    return prefill + sum(writing_seconds(decode, answers, answers, at_once, lengths))


def _prompt_tokens(prompts: list[str], tokenizer: Tokenizer | None) -> float:
    few = prompts[:32]
    if tokenizer is None:
        return sum(map(len, few)) / len(few) / CHARACTERS
    read = ConversationEncoder(tokenizer)
    return sum(len(read([{"role": "user", "content": prompt}])) for prompt in few) / len(few)
