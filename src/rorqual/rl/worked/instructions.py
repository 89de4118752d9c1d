"""Worked solutions of instructions: a list of the rules, a text made to keep them, and a check of each."""

from random import Random
from typing import Any

from rorqual.rl.envs.environment import Problem
from rorqual.rl.envs.instructions import KINDS, NUMBERS, sentences
from rorqual.rl.worked.style import DIFFERS, OPENINGS, Worked, an, slips

# Short sentences without commas, of which any may be left out and any order does.
TEXTS = {
    "rivers": (
        "A river begins as a small stream in the hills.",
        "It carries sand and stones down to the sea.",
        "Many towns were built beside rivers.",
        "Fish and birds find food in the water.",
        "In spring the melting snow makes a river rise.",
    ),
    "bread": (
        "Bread is made from flour and water and salt.",
        "Yeast makes the dough rise.",
        "The oven gives it a brown crust.",
        "People bake it in many shapes.",
        "Fresh bread smells good in the morning.",
    ),
    "the moon": (
        "The moon goes around the earth in about a month.",
        "It has no light of its own.",
        "We always see the same side of it.",
        "Its pull makes the tides.",
        "People walked on it in 1969.",
    ),
    "bicycles": (
        "A bicycle has two wheels and a frame.",
        "The rider turns the pedals with the feet.",
        "A chain moves the back wheel.",
        "Bicycles need no fuel.",
        "Many people ride one to work.",
    ),
    "tea": (
        "Tea is made from the leaves of a bush.",
        "Hot water draws out the taste.",
        "Some people add milk or sugar.",
        "Green tea and black tea come from the same plant.",
        "A cup of tea is a good reason for a break.",
    ),
    "trees": (
        "Trees take water from the ground with their roots.",
        "Their leaves turn light into sugar.",
        "A trunk grows a new ring each year.",
        "Birds build nests in the branches.",
        "Some trees live for a thousand years.",
    ),
    "cats": (
        "Cats sleep for most of the day.",
        "They hunt mice at night.",
        "A cat purrs when it is content.",
        "Its whiskers help it in the dark.",
        "Kittens learn by playing.",
    ),
    "rain": (
        "Rain falls from clouds when drops grow heavy.",
        "It fills the lakes and wells.",
        "Farmers wait for it in summer.",
        "After the rain the air is clean.",
        "Children like to jump into puddles.",
    ),
    "trains": (
        "Trains run on two steel rails.",
        "They carry many people at once.",
        "The first ones were driven by steam.",
        "A long train needs a long way to stop.",
        "From the window one sees the land go by.",
    ),
    "music": (
        "Music is made of sound and silence.",
        "A drum keeps the beat.",
        "People sing when they are happy and when they are sad.",
        "A choir has high and low voices.",
        "It takes years to play the violin well.",
    ),
    "bees": (
        "Bees live together in a hive.",
        "They gather nectar from flowers.",
        "The queen lays all the eggs.",
        "Honey is their food for the winter.",
        "A bee shows others the way by a dance.",
    ),
    "snow": (
        "Snow is made of small crystals of ice.",
        "It covers the fields in winter.",
        "Under the snow the ground stays warmer.",
        "Children build figures from it.",
        "In spring it melts and feeds the streams.",
    ),
    "books": (
        "A book keeps what someone thought long ago.",
        "It is made of paper and ink.",
        "Libraries lend books to everyone.",
        "Some people read in bed.",
        "A good story is read more than once.",
    ),
    "bridges": (
        "A bridge leads a road over water.",
        "The first ones were fallen trees.",
        "Stone arches can stand for centuries.",
        "Long bridges hang from steel cables.",
        "Ships pass below them.",
    ),
}
WITH_WORD = "It is {word} thing to think about."


def instructions(problem: Problem, rng: Random) -> Worked:
    topic, rules = problem.metadata["topic"], problem.metadata["rules"]
    lines = [rng.choice(OPENINGS), "The rules are:"]
    lines += [f"{i}. {KINDS[kind].says(value)}" for i, (kind, value) in enumerate(rules, 1)]
    answer = compose(topic, rules, rng)
    if slips(rng):
        wrong = compose(topic, [], rng)
        broken = [i for i, (kind, value) in enumerate(rules, 1) if not KINDS[kind].kept(wrong, value)]
        if broken:
            lines += [f"A first try: {wrong}", f"That breaks rule {broken[0]}.", rng.choice(DIFFERS)]
    lines.append(f"I write about {topic} and keep each rule in mind.")
    lines += [f"Rule {i}: {_how(kind, value, answer)}" for i, (kind, value) in enumerate(rules, 1)]
    return Worked("\n".join(lines), answer)


def compose(topic: str, rules: list[tuple[str, Any]], rng: Random) -> str:
    """A text on the topic that keeps the rules."""
    wanted = dict(rules)
    count = wanted.get("sentences") or wanted.get("bullets") or 3
    ending, word = wanted.get("ending"), wanted.get("word")
    extra = [WITH_WORD.format(word=an(word))] if word else []
    if ending:
        extra.append(ending)
    body = rng.sample(TEXTS[topic], max(count - len(extra), 0 if extra else 1))
    parts = [*body, *extra]
    title = f"<<{topic.capitalize()}>>\n" if "title" in wanted else ""
    text = "\n".join(f"* {part}" for part in parts) if "bullets" in wanted else " ".join(parts)
    text = title + text
    return text.lower() if "lower" in wanted else text


def _how(kind: str, value: Any, answer: str) -> str:
    """What a person who checks the answer says of a rule."""
    if kind == "sentences":
        return f"there are {NUMBERS[len(sentences(answer))]} sentences."
    if kind == "bullets":
        return f"there are {NUMBERS[value]} lines with a star."
    if kind == "words":
        return f"{len(answer.split())} words, at most {value} are allowed."
    said = {
        "no_commas": "there is no comma.",
        "lower": "there is no capital letter.",
        "ending": f'the last words are "{value}"',
        "word": f'"{value}" is there.',
        "title": "the title comes first.",
    }
    return said[kind]
