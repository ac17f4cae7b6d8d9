"""Text in and out of token ids: incremental detokenising, stop strings, chat templates."""

from foredraft.text.chat import end_of_turn_ids, render_chat
from foredraft.text.stream import TextStream

__all__ = ["TextStream", "end_of_turn_ids", "render_chat"]
