"""A stock room: what is in it only the tool knows."""

ITEMS = (
    "lamp", "chair", "kettle", "table", "spoon", "clock", "mirror",
    "pillow", "carpet", "candle", "basket", "ladder", "hammer", "bucket",
)  # fmt: skip


def stock(item: str, problem: dict) -> int:
    """Return how many there are."""
    return problem["stock"][item]


class Stockroom:
    tools = [stock]  # noqa: RUF012
    turns = 3

    def problem(self, rng):
        stock = {item: rng.randint(10, 99) for item in ITEMS}
        item = rng.choice(ITEMS)
        return {
            "question": f"How many {item}s are there?",
            "answer": stock[item],
            "key": f"{item} {stock[item]}",
            "item": item,
            "stock": stock,
        }

    def worked(self, problem, rng):
        return [("", "stock", {"item": problem["item"]}), f"There are {problem['answer']}."]
