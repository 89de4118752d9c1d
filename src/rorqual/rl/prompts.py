"""Prompt templates: from a problem to prompt tokens."""

from typing import Literal

from rorqual.data.chat_template import ChatTemplate
from rorqual.data.special_tokens import encode, escape
from rorqual.data.tokenizer import beginning
from rorqual.data.tool_formats import HERMES
from rorqual.errors import UserError
from rorqual.rl.envs.environment import Problem
from rorqual.tokenizer_protocol import Tokenizer

Template = Literal["chat", "r1-zero", "plain"]

# After the R1-Zero template (R1, table 1): reasoning and answer each in tags, the format named and shown.
R1_ZERO = (
    "A conversation between a user and an assistant. The user asks a question and the assistant solves it. "
    "The assistant first thinks the problem through, then gives the user the answer. The thinking stands within "
    "<think> </think> and the answer within <answer> </answer>, that is: "
    "<think> the thinking </think> <answer> the answer </answer>.\nUser: {question}\nAssistant:"
)


def prompt_text(question: str, template: Template, tokenizer: Tokenizer) -> str:
    """`chat`: the tokenizer's chat template; `r1-zero`: R1-Zero's template; `plain`: question, newline, <think>.

    Special-token names in the question stay text when the prompt is encoded by data/special_tokens.py. `r1-zero` and
    `plain` begin with the tokenizer's own prefix (BOS), as chat templates do by themselves. Raises UserError when the
    tokenizer has no chat template for `chat`.
    """
    if template == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise UserError("template = 'chat': the tokenizer has no chat template; use 'r1-zero' or 'plain'")
        return ChatTemplate(tokenizer).render([{"role": "user", "content": question}])
    begin, question = tokenizer.decode(list(beginning(tokenizer))), escape(question, tokenizer)
    return begin + (R1_ZERO.replace("{question}", question) if template == "r1-zero" else f"{question}\n<think>")


def problem_text(problem: Problem, template: Template, tokenizer: Tokenizer) -> str:
    """`prompt_text` of a problem's question, or of its messages and tools. Raises UserError as it does."""
    if template == "chat" and (problem.messages or problem.tools) and getattr(tokenizer, "chat_template", None):
        return ChatTemplate(tokenizer).render(problem.conversation, problem.tools)
    question = problem.question
    if problem.tools and template != "chat":
        question = f"{HERMES.describe_tools(problem.tools)}\n\n{question}"
    return prompt_text(question, template, tokenizer)


def render(question: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt of a question."""
    return encode(prompt_text(question, template, tokenizer), tokenizer)


def render_problem(problem: Problem, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt of a problem."""
    return encode(problem_text(problem, template, tokenizer), tokenizer)
