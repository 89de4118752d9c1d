"""A tokenizer's chat template: what it is handed of a conversation, and what it does with tools."""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rorqual.data.chat_messages import Message
from rorqual.data.special_tokens import plain, plain_message
from rorqual.data.tool_formats import FORMATS, HERMES, Call, Format, as_object, format_of
from rorqual.errors import UserError
from rorqual.unicode_checks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Tools = list[dict[str, Any]]

ABSENT = object()  # a content that is not there at all
END = "zqend"  # put behind a message that is to be continued


@dataclass(frozen=True)
class Habits:
    """What a template does with tools; templates do not say, so conversations are tried on it.

    format: how it writes calls. tells: it describes tools. system, results: it shows messages of role system and tool.
    calls: it shows calls, with `empty` for the content of a message that says nothing else, and arguments as `objects`
    or as text. It also shows content beside calls (`spoken`), arguments that are no object (`broken`), `several` calls
    in a message, calls `written` in the content, and takes ids of any length (`any_id`).
    """

    format: Format
    tells: bool
    system: bool
    results: bool = False
    calls: bool = False
    empty: Any = ""
    objects: bool = False
    any_id: bool = True
    spoken: bool = False
    broken: bool = False
    several: bool = False
    written: bool = True


class ChatTemplate:
    """Writes conversations as a model is trained to see them, for training and serving alike.

    What the template cannot show of tools, their descriptions, calls or results, it is handed as text (`Format`).
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.tokenizer = tokenizer
        self._habits: dict[bool, Habits] = {}

    def habits(self, tools: bool) -> Habits:
        """tools: in conversations with tools, for which a tokenizer may have a template of its own."""
        if tools not in self._habits:
            self._habits[tools] = try_out(lambda messages, told: self._apply(messages, told, False, {}), tools)
        return self._habits[tools]

    def render(
        self,
        messages: list[Message],
        tools: Tools | None = None,
        generation: bool = True,
        unfinished: bool = False,
        settings: dict[str, Any] | None = None,
    ) -> str:
        """A conversation as text for `marks.encode`; messages and tools as `read_messages` and `read_tools` give them.

        generation: an answer is to follow. unfinished: the last message is to be continued. settings: the template's
        own. Raises UserError, with the template's words where it does not accept the conversation.
        """
        if not self.tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; add chat_template.jinja beside tokenizer.json")
        messages = [plain_message(message, self.tokenizer) for message in messages]
        tools, settings = plain(tools, self.tokenizer), plain(settings or {}, self.tokenizer)
        said = messages[-1]["content"] or ""
        if unfinished:
            if "tool_calls" in messages[-1]:
                raise UserError("a message with tool_calls cannot be continued; leave them out")
            messages = [*messages[:-1], messages[-1] | {"content": said + END}]
        try:
            prepared, told = self._prepared(messages, tools)
            text = self._apply(prepared, told, generation and not unfinished, settings)
        except RecursionError:
            raise UserError("the chat template cannot show what is nested so deeply; make it flatter") from None
        except Exception as e:  # a template raises what it likes
            raise UserError(f"the chat template does not accept these messages ({_reason(e)}); mend them") from e
        if not whole(text):
            raise UserError("the messages hold half a character (a lone surrogate); give whole ones")
        if not unfinished:
            return text
        if said.lstrip() + END not in text:
            raise UserError("the chat template changes the last message, so that it cannot be continued")
        return text[: text.rindex(END)]

    def _apply(self, messages: list[Message], tools: Tools | None, generation: bool, settings: dict[str, Any]) -> str:
        # Not apply_chat_template, which takes contents of null out: some templates look for just these.
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,), _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.tokenizer.get_chat_template(tools=tools),
            add_generation_prompt=generation,
            **{**self.tokenizer.special_tokens_map, **settings},
        )
        return text

    def _prepared(self, messages: list[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages and tools as the template takes them."""
        messages = [m if m["content"] is not None or "tool_calls" in m else m | {"content": ""} for m in messages]
        if not tools and not any("tool_calls" in m or m["role"] == "tool" for m in messages):
            return messages, None
        habits = self.habits(bool(tools))
        out: list[Message] = []
        converted = False  # the last is a user's message made of results, which the next may have to join
        for message in messages:
            user, content = message["role"] == "user", message["content"]
            if "tool_calls" in message:
                out += _calling(message, habits)
            elif message["role"] == "tool" and not habits.results:
                user, content = True, content.join(habits.format.result)
                if not converted:
                    out.append({"role": "user", "content": content})
            elif message["role"] == "tool" and not habits.several:
                out.insert(_behind_call(out, message["tool_call_id"]), dict(message))
            elif not (user and converted):
                out.append(dict(message))
            if user and converted:
                out[-1]["content"] += "\n" + content
            converted = user and (converted or message["role"] == "tool")
        if not habits.any_id:
            _shorten_ids(out)
        if tools and not habits.tells:
            _tell(out, habits.format.tell(tools), habits.system)
            tools = None
        return out, tools


def _calling(message: Message, habits: Habits) -> list[Message]:
    """A message with calls as the template shows it; as text where it cannot."""
    calls, content = message["tool_calls"], message["content"] or ""
    arguments = [as_object(call["function"]["arguments"]) for call in calls]
    rest = {key: value for key, value in message.items() if key not in ("content", "tool_calls")}
    lost = (content.strip() and not habits.spoken) or (None in arguments and not habits.broken)
    if not habits.calls or (lost and habits.written):
        written = habits.format.write([Call(**call["function"]) for call in calls])
        return [rest | {"content": f"{content}\n{written}" if content.strip() else written}]
    shown = [
        call | {"function": call["function"] | ({} if given is None or not habits.objects else {"arguments": given})}
        for call, given in zip(calls, arguments, strict=True)
    ]
    found = []
    for group in [shown] if habits.several else [[call] for call in shown]:
        beside = content if content.strip() and not found else habits.empty
        found.append(rest | ({} if beside is ABSENT else {"content": beside}) | {"tool_calls": group})
    return found


def _behind_call(messages: list[Message], identity: str) -> int:
    """The place behind the call of this id among the last messages, where calls stand in messages of their own."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at]["role"] not in ("assistant", "tool"):
            break
        if any(call["id"] == identity for call in messages[at].get("tool_calls", [])):
            return at + 1
    return len(messages)


def _shorten_ids(messages: list[Message]) -> None:
    """Ids of nine letters and digits."""

    def short(identity: str) -> str:
        fits = len(identity) == 9 and identity.isascii() and identity.isalnum()
        return identity if fits else hashlib.blake2b(identity.encode(errors="replace")).hexdigest()[:9]

    for message in messages:
        if "tool_calls" in message:
            message["tool_calls"] = [call | {"id": short(call["id"])} for call in message["tool_calls"]]
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])


def _tell(messages: list[Message], text: str, system: bool) -> None:
    """Put what is to be told of tools into the system's message, or where there can be none into the first."""
    first = messages[0]
    if first["role"] == "system":
        messages[0] = first | {"content": f"{first['content']}\n\n{text}"}
    elif system or first["role"] != "user":
        messages.insert(0, {"role": "system", "content": text})
    else:
        messages[0] = first | {"content": f"{text}\n\n{first['content']}"}


# -- trying a template

ASK, TOLD, SAID, DONE, PLACE = "zqask", "zqtold", "zqsaid", "zqdone", "zqplace"
LOOK, FIND = "zqlook", "zqfind"
GIVEN = {PLACE: PLACE}
LONG_ID, SHORT_ID = "call_0123456789abcdef01234567", "zqcall001"  # Mistral's templates take nothing but the second kind
PARAMETERS = {"type": "object", "properties": {PLACE: {"type": "string"}}, "required": [PLACE]}
TOOL = {"type": "function", "function": {"name": LOOK, "description": LOOK, "parameters": PARAMETERS}}


def try_out(apply: Callable[[list[Message], Tools | None], str], tools: bool) -> Habits:
    """What a template does with tools. apply: renders messages with tools."""

    def shown(messages: list[Message], *words: str, told: bool = tools) -> str | None:
        """The text, where it shows all these words."""
        try:
            text = apply(messages, [TOOL] if told else None)
        except Exception:  # a template raises what it likes
            return None
        return text if all(word in text for word in words) else None

    def call(content: Any, *names: str, arguments: Any = GIVEN) -> list[Message]:
        if arguments is GIVEN and not objects:
            arguments = f'{{"{PLACE}": "{PLACE}"}}'
        calls = [
            {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}} for name in names
        ]
        beside = {} if content is ABSENT else {"content": content}
        return [ask, {"role": "assistant", "tool_calls": calls} | beside]

    def said(content: str) -> Message:
        return {"role": "assistant", "content": content}

    ask = {"role": "user", "content": ASK}
    plain, prompt = shown([ask], told=False), shown([ask]) or ""
    found: dict[str, Any] = {}
    form = None
    # Text first: it stays as the model wrote it. One that a template writes as JSON once more is no JSON inside.
    for objects, empty, identity in itertools.product((False, True), ("", None, ABSENT), (LONG_ID, SHORT_ID)):
        text = shown(call(empty, LOOK)) or ""
        seen = [word for word in (LOOK, PLACE) if word in text]
        if not seen or (f"{{'{PLACE}'" in text if objects else f'{{"{PLACE}": "{PLACE}"}}' not in text):
            continue
        two = shown(call(empty, LOOK, FIND)) or ""
        form = format_of(text.removeprefix(prompt), LOOK)
        result = {"role": "tool", "content": DONE, "tool_call_id": identity, "name": LOOK}
        found = {
            "calls": True,
            "empty": empty,
            "objects": objects,
            "any_id": identity == LONG_ID,
            "spoken": shown(call(SAID, LOOK), SAID, *seen) is not None,
            "broken": shown(call(empty, LOOK, arguments=PLACE), PLACE) is not None,
            "several": FIND in two if LOOK in seen else two.count(PLACE) > text.count(PLACE),
            "results": shown([*call(empty, LOOK), result], DONE) is not None,
            "written": shown([ask, said(SAID), result, said(TOLD)], SAID, TOLD) is not None,
        }
        break
    if form is None:  # then in that by whose mark it tells how to call
        form = next((f for f in FORMATS if not f.bare and any(mark in prompt for mark in f.opens)), HERMES)
    return Habits(
        format=form,
        tells=tools and prompt not in ("", plain),
        system=shown([{"role": "system", "content": TOLD}, ask], TOLD) is not None,
        **found,
    )


def _reason(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return (f"line {line}: " if line else "") + (str(error).strip() or type(error).__name__)
