"""Prompt templates: from a question to prompt tokens."""

from typing import Literal

from rorqual.data.chat_template import ChatTemplate
from rorqual.data.special_tokens import encode, escape
from rorqual.data.tokenizer import beginning
from rorqual.errors import UserError
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


def render(question: str, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt."""
    return encode(prompt_text(question, template, tokenizer), tokenizer)
