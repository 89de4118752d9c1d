"""Code that a model wrote, judged by tests in the sandbox."""

from rorqual.sandbox.run_program import Limits, run_program


def passes(answer: str, tests: list[str]) -> bool:
    code = answer.strip().removeprefix("```python").removesuffix("```")
    return run_program(code + "\n\n" + "\n".join(tests) + "\n", Limits()).passed
