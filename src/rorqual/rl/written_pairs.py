"""Preference pairs without a data set: a model's own answers, against worse twins that rules make.

| twin | how it is made |
|---|---|
| off-topic | the answer to another prompt |
| cut-off | ends in the middle of a sentence |
| repeated | says one of its paragraphs twice |
| hot | sampled at a high temperature |
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from rorqual.data.prompts_file import read_prompts
from rorqual.engine import Completion, Engine, SamplingParams
from rorqual.errors import UserError, file_error
from rorqual.files import write_text
from rorqual.judge.extract_answer import final_summary
from rorqual.plan.reward_here import AT_ONCE
from rorqual.recipe import RewardRecipe
from rorqual.rl.distillation import open_to_append
from rorqual.rl.prompts import Template, render
from rorqual.rl.rollout import derived_seed

SENTENCE_END = re.compile(r"[.!?][\"'”’)\]*]*(?=\s|$)")
LEAST_WORDS = 6  # of an answer that is cut
KEPT = 0.3, 0.8  # of the words, at least and at most, of an answer that is cut
Answers = tuple[str, str | None, str | None]  # prompt; answer; answer sampled hot


def write_pairs(recipe: RewardRecipe, path: Path, device: torch.device) -> None:
    """Write a line for each pair, with the `twin` that its worse answer is.

    Answers go to samples.partial.jsonl beside `path` as soon as they are sampled. Raises UserError.
    """
    assert recipe.pairs is not None
    prompts = read_prompts(recipe.pairs.prompts)
    partial = path.with_name("samples.partial.jsonl")
    found = _read_partial(partial)
    if len(found) < len(prompts):
        found += _sampled(recipe, prompts, len(found), partial, device)
    rows = pair_rows(found, recipe.pairs.twins, recipe.seed)
    if not rows:
        raise UserError(
            f"pairs.model = {recipe.pairs.model!r}: it gave no whole answer to any of the prompts within "
            f"pairs.max_tokens = {recipe.pairs.max_tokens}; raise that, or take another model"
        )
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, lines, then="then continue with --resume")
    partial.unlink(missing_ok=True)
    answered = len({row["prompt"] for row in rows})
    print(f"{path}: {len(rows)} pairs, of answers to {answered} of {len(prompts)} prompts")


def pair_rows(answers: list[Answers], twins: int, seed: int) -> list[dict[str, str]]:
    """Of each answer, as many pairs with different twins, of those that there are of it."""
    whole = [(prompt, answer, hot) for prompt, answer, hot in answers if answer is not None]
    rows: list[dict[str, str]] = []
    for i, (prompt, answer, hot) in enumerate(whole):
        rng = Random(derived_seed(seed, "twins", i))
        others = [other for _, other, _ in whole if other != answer]
        made = {
            "off-topic": rng.choice(others) if others else None,
            "cut-off": cut_off(answer, rng),
            "repeated": repeated(answer, rng),
            "hot": hot,
        }
        kinds = [kind for kind in rng.sample(list(made), len(made)) if made[kind] not in (None, answer)]
        rows += [
            {"prompt": prompt, "chosen": answer, "rejected": made[kind] or "", "twin": kind} for kind in kinds[:twins]
        ]
    return rows


def cut_off(answer: str, rng: Random) -> str | None:
    """The first words of an answer, that end no sentence; None for a short answer."""
    ends = [match.end() for match in re.finditer(r"\S+", answer)]
    if len(ends) < LEAST_WORDS:
        return None
    kept = rng.randint(max(1, round(KEPT[0] * len(ends))), round(KEPT[1] * len(ends)))
    return answer[: ends[kept - 1]].rstrip(".!?,;:\"'”’)]*") or None


def repeated(answer: str, rng: Random) -> str:
    """With one of its paragraphs twice."""
    paragraphs = [part for part in re.split(r"\n\s*\n", answer) if part.strip()]
    again = rng.randrange(len(paragraphs))
    return "\n\n".join([*paragraphs[: again + 1], *paragraphs[again:]])


def whole_answer(text: str, truncated: bool) -> str | None:
    """The final summary; of a completion that was cut off, up to its last whole sentence. None where there is none."""
    summary = final_summary(text)
    if summary is None or not truncated:
        return summary
    ends = [match.end() for match in SENTENCE_END.finditer(summary)]
    return summary[: ends[-1]] if ends else None


def _sampled(
    recipe: RewardRecipe, prompts: list[str], start: int, partial: Path, device: torch.device
) -> list[Answers]:
    from rich.console import Console
    from rich.progress import Progress

    section = recipe.pairs
    assert section is not None
    engine, found = Engine(section.model, device=device), list[Answers]()
    tokenizer = engine.require_tokenizer()
    template: Template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar, open_to_append(partial) as file:
        task = bar.add_task(f"answers of {section.model}", total=len(prompts), completed=start)
        for first in range(start, len(prompts), AT_ONCE):
            asked = prompts[first : first + AT_ONCE]
            tokens = [render(prompt, template, tokenizer) for prompt in asked]
            params = [
                SamplingParams(
                    temperature=t, max_tokens=section.max_tokens, seed=derived_seed(recipe.seed, name, first)
                )
                for name, t in (("answers", section.temperature), ("hot answers", section.hot))
                for _ in asked
            ]
            completions = engine.generate([*tokens, *tokens], params)
            read = _reader(engine)
            here = [read(*pair) for pair in zip([*tokens, *tokens], completions, strict=True)]
            rows = list(zip(asked, here[: len(asked)], here[len(asked) :], strict=True))
            try:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
            except OSError as e:
                raise file_error(partial, e, then="then continue with --resume") from e
            found += rows
            bar.update(task, completed=first + len(asked))
    return found


def _reader(engine: Engine) -> Callable[[list[int], Completion], str | None]:
    def read(prompt: list[int], completion: Completion) -> str | None:
        return whole_answer(engine.opening(prompt) + completion.text, completion.finish_reason == "length")

    return read


def _read_partial(path: Path) -> list[Answers]:
    """The answers of whole sampling calls; what a kill has cut off is truncated away."""
    found: list[Answers] = []
    sizes: list[int] = []
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                prompt, answer, hot = json.loads(line)
                found.append((str(prompt), answer, hot))
                sizes.append(len(line))
        whole = len(found) // AT_ONCE * AT_ONCE
        os.truncate(path, sum(sizes[:whole]))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise file_error(path, e, "read", "then continue with --resume") from e
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is damaged ({e}); delete it to sample again, then continue with --resume") from e
    return found[:whole]
