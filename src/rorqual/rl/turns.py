"""How the turns of an episode follow each other in tokens.

What the model sampled is never tokenised again. The tokens of the environment's turn are those that the template puts
between the model's turn and its next one: a short conversation is rendered with that turn, and what comes after the
model's words is encoded once. This is right only for templates that append: where the text with the turn does not begin
with the text without it (some templates drop earlier thinking), the environment is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from rorqual.data.chat_messages import Message, ToolCall
from rorqual.data.chat_template import ChatTemplate, Tools
from rorqual.data.special_tokens import encode, escape
from rorqual.data.tool_formats import HERMES, Format
from rorqual.errors import UserError
from rorqual.rl.envs.environment import Environment
from rorqual.rl.prompts import Template
from rorqual.tokenizer_protocol import Tokenizer

ASKED, THOUGHT, SAID, TOLD = "zqasked", "zqthought", "zqsaid", "zqtold"  # texts that no template contains


@dataclass
class Turns:
    """The turns of one tokenizer and prompt template."""

    tokenizer: Tokenizer
    template: Template
    end_tokens: Sequence[int] = ()  # that end the model's turn; the environment's follow them

    def __post_init__(self) -> None:
        self._chat = ChatTemplate(self.tokenizer) if self.template == "chat" else None
        ends = [self.tokenizer.decode([token]) for token in self.end_tokens]
        self._ends = [*ends, *([self.tokenizer.eos_token] if self.tokenizer.eos_token else [])]

    def calls(self, tools: bool) -> Format:
        """How the model writes calls, in conversations with tools."""
        return HERMES if self._chat is None else self._chat.tool_support(tools).format

    def tokens(self, said: Sequence[Message], tools: Tools | None, after: int) -> list[int]:
        """The environment's turn in tokens, up to where the model goes on. after: the last token that it sampled.

        Raises UserError where the template does not append turns.
        """
        return encode(self.text(said, tools), self.tokenizer, after)

    def text(self, said: Sequence[Message], tools: Tools | None) -> str:
        """The turn for `tokens`, after the token that ended the model's. Raises UserError as there."""
        if self._chat is None:
            return self._plain(said)
        ids = [f"call{n:05}" for n in range(len(said))]  # nine letters and digits, as Mistral's must be
        marked = [
            cast(Message, message | {"tool_call_id": identity}) if message["role"] == "tool" else message
            for message, identity in zip(said, ids, strict=True)
        ]
        asked: Message = {"role": "user", "content": ASKED}
        thinks = "</think>" in self.tokenizer.get_vocab()
        answer: Message = {"role": "assistant", "content": f"<think>{THOUGHT}</think>{SAID}" if thinks else SAID}
        as_calls = said[0]["role"] == "tool" and not self._chat.tool_support(bool(tools)).accepts_written_calls
        if as_calls:
            names = [message.get("name", SAID) for message in said]
            answer = {"role": "assistant", "content": "", "tool_calls": list(map(_call, ids, names))}
        before = self._chat.render([asked, answer], tools, generation=False)
        whole = self._chat.render([asked, answer, *marked], tools)
        shown = [SAID, THOUGHT] if thinks and not as_calls else [SAID]
        if not whole.startswith(before) or not all(word in before for word in shown):
            raise UserError(
                "the chat template changes the model's earlier turns, such as their thinking, when another follows, so "
                "that what was sampled is not what it would go on from; use one that appends, or template = 'r1-zero'"
            )
        at = before.rindex(SAID) + len(SAID)
        ends = [(at + index, end) for end in self._ends if (index := before[at:].find(end)) >= 0]
        if as_calls and not ends:
            raise UserError("the chat template ends no message with calls by an end token; use template = 'r1-zero'")
        start, end = min(ends, default=(at, ""))
        return whole[start + len(end) :]

    def check(self, environment: Environment) -> None:
        """Raise UserError where the template does not append the environment's turns."""
        tools = getattr(environment, "tools", {})
        described = [tool.description for tool in tools.values()] or None
        try:
            self.text([{"role": "user", "content": TOLD}], described)
            if tools:
                self.text([{"role": "tool", "content": TOLD, "name": next(iter(tools))}], described)
        except UserError as e:
            raise UserError(f"environment {environment.family}: {e}") from None

    def _plain(self, said: Sequence[Message]) -> str:
        begin, end = HERMES.result
        parts = [
            f"{begin}{message['content']}{end}" if message["role"] == "tool" else message["content"] or ""
            for message in said
        ]
        text = escape("\n".join(parts), self.tokenizer)
        return f"\nUser: {text}\nAssistant:" if self.template == "r1-zero" else f"\n{text}\n<think>"


def _call(identity: str, name: str) -> ToolCall:
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": f'{{"{SAID}": 1}}'}}
