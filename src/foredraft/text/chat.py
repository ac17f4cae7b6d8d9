"""Conversations as token ids, by the model's own chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from foredraft.errors import RequestError
from foredraft.text.detokenize import added_tokens

ROLES = ("system", "developer", "user", "assistant", "tool")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """A conversation as the token ids after which the model's next turn begins.

    Raises:
        RequestError: no template, no messages, an unknown role, content that is not text, or the template refuses.
    """
    if not tokenizer.chat_template:
        raise RequestError("this model's tokenizer has no chat template; pass the text itself to `generate` instead")
    if isinstance(messages, (str, Mapping)) or not messages:
        raise RequestError(
            f"messages={messages!r}: a chat needs at least one {{'role': ..., 'content': ...}} in a list"
        )
    for index, message in enumerate(messages):
        _check_message(index, message)
    ids = _apply_template(tokenizer, messages, tokenize=True)
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
            rendered = _apply_template(tokenizer, turns, tokenize=False)
        except RequestError:  # a template with demands of its own; rendering the user's chat will say which
            continue
        rest = rendered.partition(marker)[2].lstrip()
        ids = tokenizer(rest, add_special_tokens=False)["input_ids"] if rest else []
        if ids and ids[0] in added_tokens(tokenizer):
            return (ids[0],)
    return ()


def _check_message(index: int, message: object) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RequestError(f"messages[{index}]={message!r} is no {{'role': ..., 'content': ...}}")
    if message["role"] not in ROLES:
        raise RequestError(f"messages[{index}] has role {message['role']!r}; it must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise RequestError(f"messages[{index}] has content {message.get('content')!r}; it must be text")


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, tokenize: bool
) -> Any:
    """The dialogue as text, or as token ids that ask for the assistant's next turn."""
    turns = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=tokenize, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # a template is somebody's program and may raise anything
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
