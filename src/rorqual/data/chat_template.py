"""Render conversations with a tokenizer's chat template, also tools that the template does not support."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rorqual.data.chat_messages import Message
from rorqual.data.special_tokens import escape, escape_message
from rorqual.data.tool_formats import FORMATS, HERMES, Call, Format, as_object, format_of
from rorqual.errors import UserError
from rorqual.tokenizer_protocol import Tokenizer
from rorqual.unicode_checks import whole

Tools: TypeAlias = Sequence[Mapping[str, object]]  # as of `read_tools`
# As a template takes it: the content may be absent, and a call's arguments an object.
TemplateMessage: TypeAlias = dict[str, Any]

ABSENT = object()  # no `content` key at all
END = "zqend"  # marks the end of a message that is to be continued


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template supports of tools. Templates do not declare it, so `probe` renders test conversations."""

    format: Format  # how calls are written
    shows_tools: bool  # renders the tools' descriptions
    shows_system: bool  # renders system messages
    shows_results: bool = False  # renders messages of role tool
    shows_calls: bool = False  # renders tool_calls
    empty_content: object = ""  # the content of a message with calls only: "", None or ABSENT
    arguments_as_objects: bool = False  # takes a call's arguments as an object, else as JSON text
    any_id: bool = True  # takes call ids of any length
    shows_content: bool = False  # renders content beside calls
    shows_invalid_arguments: bool = False  # renders arguments that are not an object
    parallel_calls: bool = False  # renders several calls in a message
    accepts_written_calls: bool = True  # takes a result after a message without tool_calls


class ChatTemplate:
    """Renders conversations in the model's format, for training and serving alike.

    Tool descriptions, calls and results that the template does not support are rendered as message text (`Format`).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._tool_support: dict[bool, ToolSupport] = {}

    def tool_support(self, tools: bool) -> ToolSupport:
        """tools: of the template for conversations with tools, which a tokenizer may have beside the default one."""
        if tools not in self._tool_support:
            self._tool_support[tools] = probe(self._apply, tools)
        return self._tool_support[tools]

    def render(
        self,
        messages: Sequence[Message],
        tools: Tools | None = None,
        generation: bool = True,
        unfinished: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        """A conversation as text for `special_tokens.encode`; messages, tools: of `read_messages` and `read_tools`.

        generation: end with the generation prompt. unfinished: the model continues the last message. settings:
        variables of the template. Raises UserError, with the template's own error where it does not accept the
        conversation.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; add chat_template.jinja beside tokenizer.json")
        escaped = [escape_message(message, self.tokenizer) for message in messages]
        tools, settings = escape(tools, self.tokenizer), escape(settings, self.tokenizer)
        last = escaped[-1]["content"] or ""
        if unfinished:
            if "tool_calls" in escaped[-1]:
                raise UserError("a message with tool_calls cannot be continued; remove them")
            escaped[-1]["content"] = last + END
        try:
            prepared, shown = self._prepared(escaped, tools)
            text = self._apply(prepared, shown, generation and not unfinished, settings)
        except RecursionError:
            raise UserError("the chat template cannot render values nested this deeply; make them flatter") from None
        except Exception as e:  # a template may raise anything
            raise UserError(f"the chat template does not accept these messages ({_reason(e)}); correct them") from e
        if not whole(text):
            raise UserError("the messages contain a lone surrogate (half a character); remove it")
        if not unfinished:
            return text
        if last.lstrip() + END not in text:
            raise UserError("the chat template changes the last message, so that it cannot be continued")
        return text[: text.rindex(END)]

    def _apply(
        self,
        messages: list[TemplateMessage],
        tools: Tools | None,
        generation: bool = False,
        settings: Mapping[str, object] | None = None,
    ) -> str:
        # Not apply_chat_template, which drops null contents: some templates test for them.
        from transformers.utils.chat_template_utils import render_jinja_template

        listed: list[dict[str, Any] | Callable[..., Any]] | None = None if tools is None else [{**t} for t in tools]
        (text,), _ = render_jinja_template(
            conversations=[messages],
            tools=listed,
            chat_template=self.tokenizer.get_chat_template(tools=listed),
            add_generation_prompt=generation,
            **{**self.tokenizer.special_tokens_map, **(settings or {})},
        )
        return text

    def _prepared(self, messages: list[Message], tools: Tools | None) -> tuple[list[TemplateMessage], Tools | None]:
        """Messages and tools in the form that the template supports."""
        for message in messages:
            if message["content"] is None and "tool_calls" not in message:
                message["content"] = ""
        if not tools and not any("tool_calls" in m or m["role"] == "tool" for m in messages):
            return [dict(message) for message in messages], None
        support = self.tool_support(bool(tools))
        out: list[TemplateMessage] = []
        converted = False  # the last message is a user's, made of results, and the next may have to be merged into it
        for message in messages:
            user, content = message["role"] == "user", message["content"] or ""
            if "tool_calls" in message:
                out += _with_calls(message, support)
            elif message["role"] == "tool" and not support.shows_results:
                user, content = True, content.join(support.format.result)
                if not converted:
                    out.append({"role": "user", "content": content})
            elif message["role"] == "tool" and not support.parallel_calls:
                out.insert(_after_call(out, message.get("tool_call_id", "")), dict(message))
            elif not (user and converted):
                out.append(dict(message))
            if user and converted:
                out[-1]["content"] += "\n" + content
            converted = user and (converted or message["role"] == "tool")
        if not support.any_id:
            _shorten_ids(out)
        if tools and not support.shows_tools:
            _add_tools(out, support.format.describe_tools(tools), support.shows_system)
            tools = None
        return out, tools


def _with_calls(message: Message, support: ToolSupport) -> list[TemplateMessage]:
    """A message with calls in the form that the template renders; with the calls as text where it cannot."""
    calls, content = message.get("tool_calls", []), message["content"] or ""
    arguments = [as_object(call["function"]["arguments"]) for call in calls]
    rest: TemplateMessage = {key: value for key, value in message.items() if key not in ("content", "tool_calls")}
    lost = (content.strip() and not support.shows_content) or (
        None in arguments and not support.shows_invalid_arguments
    )
    if not support.shows_calls or (lost and support.accepts_written_calls):
        written = support.format.write([Call(**call["function"]) for call in calls])
        return [rest | {"content": f"{content}\n{written}" if content.strip() else written}]
    shown: list[dict[str, object]] = []
    for call, given in zip(calls, arguments, strict=True):
        objects = support.arguments_as_objects and given is not None
        shown.append({**call, "function": {**call["function"], "arguments": given}} if objects else {**call})
    found: list[TemplateMessage] = []
    for group in [shown] if support.parallel_calls else [[call] for call in shown]:
        beside = content if content.strip() and not found else support.empty_content
        found.append(rest | ({} if beside is ABSENT else {"content": beside}) | {"tool_calls": group})
    return found


def _after_call(messages: list[TemplateMessage], identity: str) -> int:
    """Index after the call of this id among the last messages, where each call is a message of its own."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at]["role"] not in ("assistant", "tool"):
            break
        if any(call["id"] == identity for call in messages[at].get("tool_calls", [])):
            return at + 1
    return len(messages)


def _shorten_ids(messages: list[TemplateMessage]) -> None:
    """Replace call ids by nine letters and digits, the form of Mistral's templates."""

    def short(identity: str) -> str:
        fits = len(identity) == 9 and identity.isascii() and identity.isalnum()
        return identity if fits else hashlib.blake2b(identity.encode(errors="replace")).hexdigest()[:9]

    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [call | {"id": short(call["id"])} for call in message["tool_calls"]]
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])


def _add_tools(messages: list[TemplateMessage], text: str, system: bool) -> None:
    """Put the tools' description into the system message, or into the first where there can be none."""
    first = messages[0]
    if first["role"] == "system":
        messages[0] = first | {"content": f"{first['content']}\n\n{text}"}
    elif system or first["role"] != "user":
        messages.insert(0, {"role": "system", "content": text})
    else:
        messages[0] = first | {"content": f"{text}\n\n{first['content']}"}


# -- probing a template

ASK, TOLD, SAID, DONE, PLACE = "zqask", "zqtold", "zqsaid", "zqdone", "zqplace"
LOOK, FIND = "zqlook", "zqfind"
GIVEN = {PLACE: PLACE}
LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "zqcall001"  # Mistral's templates take only the second kind
PARAMETERS = {"type": "object", "properties": {PLACE: {"type": "string"}}, "required": [PLACE]}
TOOL = {"type": "function", "function": {"name": LOOK, "description": LOOK, "parameters": PARAMETERS}}


def probe(apply: Callable[[list[TemplateMessage], Tools | None], str], tools: bool) -> ToolSupport:
    """What a template supports of tools. apply: renders messages with tools."""

    def shown(messages: list[TemplateMessage], *words: str, with_tools: bool = tools) -> str | None:
        """The rendered text; None where it lacks one of the words or fails."""
        try:
            text = apply(messages, [TOOL] if with_tools else None)
        except Exception:  # a template may raise anything
            return None
        return text if all(word in text for word in words) else None

    def call(content: object, *names: str, arguments: object = GIVEN) -> list[TemplateMessage]:
        if arguments is GIVEN and not objects:
            arguments = f'{{"{PLACE}": "{PLACE}"}}'
        calls = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}} for name in names
        ]
        beside = {} if content is ABSENT else {"content": content}
        return [ask, {"role": "assistant", "tool_calls": calls} | beside]

    def answer(content: str) -> TemplateMessage:
        return {"role": "assistant", "content": content}

    ask = {"role": "user", "content": ASK}
    without_tools, prompt = shown([ask], with_tools=False), shown([ask]) or ""
    found: dict[str, Any] = {}
    form = None
    # Arguments as text first: they stay as the model wrote them. A template that encodes them as JSON once more fails.
    for objects, empty, identity in itertools.product((False, True), ("", None, ABSENT), (LONG_ID, SHORT_ID)):
        text = shown(call(empty, LOOK)) or ""
        seen = [word for word in (LOOK, PLACE) if word in text]
        if not seen or (f"{{'{PLACE}'" in text if objects else f'{{"{PLACE}": "{PLACE}"}}' not in text):
            continue
        two = shown(call(empty, LOOK, FIND)) or ""
        form = format_of(text.removeprefix(prompt), LOOK)
        result = {"role": "tool", "content": DONE, "tool_call_id": identity, "name": LOOK}
        found = {
            "shows_calls": True,
            "empty_content": empty,
            "arguments_as_objects": objects,
            "any_id": identity == LONG_ID,
            "shows_content": shown(call(SAID, LOOK), SAID, *seen) is not None,
            "shows_invalid_arguments": shown(call(empty, LOOK, arguments=PLACE), PLACE) is not None,
            "parallel_calls": FIND in two if LOOK in seen else two.count(PLACE) > text.count(PLACE),
            "shows_results": shown([*call(empty, LOOK), result], DONE) is not None,
            "accepts_written_calls": shown([ask, answer(SAID), result, answer(TOLD)], SAID, TOLD) is not None,
        }
        break
    if form is None:  # then the format whose opening the tools' description contains
        form = next((f for f in FORMATS if not f.bare and any(mark in prompt for mark in f.opens)), HERMES)
    return ToolSupport(
        format=form,
        shows_tools=tools and prompt not in ("", without_tools),
        shows_system=shown([{"role": "system", "content": TOLD}, ask], TOLD) is not None,
        **found,
    )


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return (f"line {line}: " if line else "") + (str(error).strip() or type(error).__name__)
