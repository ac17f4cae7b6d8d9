"""Conversations as token ids, by the model's own chat template."""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from foredraft.errors import RequestError
from foredraft.text.detokenize import added_tokens
from foredraft.text.prompt import check_unicode

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable[..., Any]


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """A conversation as the token ids after which the model's next turn begins.

    Args:
        tokenizer: with the chat template.
        messages: roles with content, a text or a list of text parts; an assistant's turn may have tool calls instead.
        tools: what the model may call: JSON schemas, or functions that transformers can make one of.
        arguments: further variables of the template, as `documents` or `enable_thinking`.

    Raises:
        RequestError: no template, no messages, an unknown role, content that is not text, tools or arguments that the
            template does not use, or the template refuses.
    """
    if not tokenizer.chat_template:
        raise RequestError(
            "this model's tokenizer has no chat template; pass the text itself to `generate`, or give a "
            "template: LLM(chat_template=FILE), --chat-template FILE"
        )
    if isinstance(messages, (str, Mapping)) or not messages:
        raise RequestError(
            f"messages={messages!r}: a chat needs at least one {{'role': ..., 'content': ...}} in a list"
        )
    for index, message in enumerate(messages):
        _check_message(index, message)
    if not isinstance(arguments, Mapping | None):
        raise RequestError(f"template_arguments={arguments!r} is not usable; give a dict of the template's variables")
    variables = _variables(tokenizer, tools, arguments)
    ids = _rendered(tokenizer, messages, variables)
    if not ids:
        raise RequestError("the chat template renders these messages to nothing; give them some content")
    return [int(token) for token in ids]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The token by which the chat template ends an assistant's turn; empty if there is no template or no such token.

    It is the added token that follows the assistant's words in a rendered dialogue, or opens the next user's turn
    where the template writes none of its own (GLM). A generation_config often lacks it.
    """
    if not tokenizer.chat_template:
        return ()
    marker = "Certainly"
    dialogue = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": marker}]
    for turns in (dialogue, [*dialogue, {"role": "user", "content": "Goodbye"}]):
        try:
            rendered = _apply_template(tokenizer, turns, {}, tokenize=False)
        except RequestError:  # a template with demands of its own; rendering the user's chat will say which
            continue
        rest = rendered.partition(marker)[2].lstrip()
        ids = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"] if rest else []
        if ids and ids[0] in added_tokens(tokenizer):
            return (ids[0],)
    return ()


# --- what may be in a message ---------------------------------------------------------------------------------------


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RequestError(f"messages[{index}]={message!r} is no {{'role': ..., 'content': ...}}")
    if message["role"] not in ROLES:
        raise RequestError(f"messages[{index}] has role {message['role']!r}; it must be one of {', '.join(ROLES)}")
    check_unicode(message, f"messages[{index}]")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        _check_calls(index, calls)
    if isinstance(content, list | tuple):
        _check_parts(index, content)
    elif not isinstance(content, str) and not (content is None and calls):
        raise RequestError(f"messages[{index}] has content {content!r}; it must be text, or a list of text parts")


def _check_parts(index: int, parts: Sequence[object]) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in (None, "text"):
            raise RequestError(
                f"messages[{index}] has a part of type {kind!r}; only text is read here: send parts of type 'text'"
            )
        if not isinstance(part, Mapping) or kind is None or not isinstance(part.get("text"), str):
            raise RequestError(f"messages[{index}] has the part {part!r}; it must be {{'type': 'text', 'text': ...}}")


def _check_calls(index: int, calls: object) -> None:
    usable = isinstance(calls, list | tuple) and all(
        isinstance(call, Mapping) and isinstance(_function(call).get("name"), str) for call in calls
    )
    if not usable:
        form = "[{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}]"
        raise RequestError(f"messages[{index}] has tool_calls {calls!r}; they must be a list such as {form}")


def _function(call: Message) -> Message:
    """Both forms that templates read: the function within the call, or the call itself."""
    function = call.get("function", call)
    return function if isinstance(function, Mapping) else {}


# --- what the template is given -------------------------------------------------------------------------------------


def _variables(
    tokenizer: PreTrainedTokenizerBase, tools: Sequence[Tool], arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Raises RequestError for tools and arguments of the wrong kind, and for those the template would not look at."""
    if isinstance(tools, str | Mapping) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise RequestError(f"tools={tools!r} is not usable; give a list of JSON schemas or functions")
    variables = dict(arguments or {})
    fixed = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents"} | {"messages", "tools"}
    if taken := sorted(fixed.intersection(variables)):
        raise RequestError(f"template arguments {', '.join(taken)} are not the template's own; leave them out")
    if tools:
        variables["tools"] = list(tools)
    check_unicode(variables, "a tool or template argument")
    source = str(_refusing(lambda: tokenizer.get_chat_template(tools=variables.get("tools"))))
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", source):
            raise RequestError(
                f"the model's chat template knows no {name!r}, so it cannot be honoured; leave it out, "
                "or give a template that does: LLM(chat_template=FILE), --chat-template FILE"
            )
    return variables


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], variables: dict[str, Any]) -> list[int]:
    """Arguments of tool calls go in as objects, as templates want them; as they came where a template wants text."""
    turns = [_present(message) for message in messages]
    if any(isinstance(turn.get("content"), list | tuple) for turn in turns) and not _takes_parts(tokenizer):
        turns = [_with_joined_parts(turn) for turn in turns]
    parsed = [_with_parsed_calls(turn) for turn in turns]
    try:
        return _apply_template(tokenizer, parsed, variables)  # type: ignore[no-any-return]
    except RequestError:
        if parsed == turns:
            raise
        return _apply_template(tokenizer, turns, variables)  # type: ignore[no-any-return]


def _present(message: Message) -> dict[str, Any]:
    """Without keys that are None: a template would write the word."""
    return {key: value for key, value in message.items() if value is not None}


def _takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads content parts itself: a list of one then gives what its text gives."""
    rendered: list[str | None] = []
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        try:
            rendered.append(_apply_template(tokenizer, [{"role": "user", "content": content}], {}, tokenize=False))
        except RequestError:
            rendered.append(None)
    text, parts = rendered
    return parts is not None and text in (None, parts)


def _with_joined_parts(turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    if not isinstance(content, list | tuple):
        return turn
    return turn | {"content": "\n".join(part["text"] for part in content)}


def _with_parsed_calls(turn: dict[str, Any]) -> dict[str, Any]:
    """Tool calls whose arguments are objects where they came as JSON text, which is OpenAI's form."""
    if "tool_calls" not in turn:
        return turn
    return turn | {"tool_calls": [_parsed(call) for call in turn["tool_calls"]]}


def _parsed(call: Message) -> dict[str, Any]:
    function = _function(call)
    try:
        found = json.loads(function.get("arguments", ""))
    except (TypeError, ValueError):  # an object already, or text that is no JSON
        return dict(call)
    own = {**function, "arguments": found} if isinstance(found, dict) else function
    return {**call, "function": own} if "function" in call else dict(own)


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Message],
    variables: Mapping[str, Any],
    *,
    tokenize: bool = True,
) -> Any:
    """The dialogue as text, or as token ids that ask for the assistant's next turn."""
    return _refusing(
        lambda: tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            add_generation_prompt=tokenize,
            tokenize=tokenize,
            return_dict=False,
            tokenizer_kwargs={"verbose": False},  # a prompt beyond the context is refused by us, in words
            **variables,
        )
    )


def _refusing(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except Exception as error:  # a template is somebody's program and may raise anything
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
