"""A task of several turns: products too large for a small model's head, with a tool that computes them."""


def calculate(expression: str) -> str:
    """Compute a product of whole numbers, such as 12 * 34."""
    numbers = [int(part) for part in expression.split("*")]
    product = 1
    for number in numbers:
        product *= number
    return str(product)


class Calculator:
    tools = [calculate]  # noqa: RUF012
    turns = 3

    def problem(self, rng):
        a, b = rng.randrange(100, 10_000), rng.randrange(100, 10_000)
        return {"question": f"What is {a} * {b}? Use the tool.", "answer": a * b, "expression": f"{a} * {b}"}

    def worked(self, problem, rng):
        product = calculate(problem["expression"])
        thought = rng.choice(("This is too large to do in my head.", "I let the tool compute this.", "A product."))
        return [
            (f"<think>{thought}</think>", "calculate", {"expression": problem["expression"]}),
            f"<think>The tool says {product}.</think><answer>{product}</answer>",
        ]
