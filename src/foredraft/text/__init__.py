"""Text in and out of token ids: prompts, chat templates, incremental detokenising, stop strings."""

from foredraft.text.chat import Message, Tool, end_of_turn_ids, render_chat
from foredraft.text.detokenize import token_bytes
from foredraft.text.prompt import encode_text
from foredraft.text.stream import TextStream
from foredraft.text.template import read_template

__all__ = [
    "Message",
    "TextStream",
    "Tool",
    "encode_text",
    "end_of_turn_ids",
    "read_template",
    "render_chat",
    "token_bytes",
]
