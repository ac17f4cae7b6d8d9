"""`foredraft chat`: a conversation at the prompt."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from foredraft.cli import session
from foredraft.cli.console import interruptible, note
from foredraft.cli.options import ChatOptions, takes
from foredraft.errors import PromptTooLongError, RequestError

if TYPE_CHECKING:
    from foredraft import LLM, SamplingParams

HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C ends an answer"
HISTORY_LENGTH = 1000
LOCAL = (
    "draft", "dtype", "weight_format", "runtime", "device", "draft_device", "draft_weight_format", "draft_profile",
    "trust_remote_code", "gpu", "policy", "chat_template",
)  # fmt: skip


@takes(ChatOptions)
def chat(options: ChatOptions) -> None:
    """Talk to the model, turn by turn; it needs a chat template. /reset, /exit, Ctrl-D."""
    llm, params = session.start(options) if options.server is None else connect(options, options.server)
    if not llm.tokenizer.chat_template:
        raise RequestError(
            "this model's tokenizer has no chat template; use `foredraft generate` with plain text, or give "
            "one with --chat-template FILE"
        )
    conversation = Conversation(llm, params, options.num_draft_tokens, options.system)
    if session.interactive():
        note(HELP)
    with line_history():
        while turn(conversation):
            pass


def connect(options: ChatOptions, server: str) -> "tuple[LLM, SamplingParams]":
    """The model of a server, in the shape of one here. Raises RequestError for flags that it has no say in."""
    from foredraft.cli.launch import ServerOptions
    from foredraft.cli.launch import connect as open_client
    from foredraft.cli.remote import open_remote

    own = [name for name in LOCAL if getattr(options, name) != getattr(ChatOptions(), name)]
    if own:
        given = ", ".join("--" + name.replace("_", "-") for name in own)
        raise RequestError(f"--server contradicts {given}: the server has decided that; drop one of them")
    if options.regex is not None or options.grammar is not None:
        raise RequestError("--server takes no --regex and no --grammar; give --json-schema, or run the model here")
    params = session.sampling_params(options)
    model = open_remote(open_client(ServerOptions(server, options.api_key)), options.model)
    interruptible()
    return cast("LLM", model), params


@dataclass(slots=True)
class Conversation:
    """The turns so far, and what a line typed at the prompt does to them."""

    llm: "LLM"
    params: "SamplingParams"
    num_draft_tokens: int | None = None
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def react(self, line: str) -> bool:
        """Answer, or obey a command; False: the conversation is over."""
        line = line.removeprefix("\ufeff").strip()
        if line == "/exit":
            return False
        if line == "/reset":
            self.reset()
            note("the conversation starts anew")
        elif line.startswith("/"):
            note(f"{line.split()[0]} is no command; {HELP}")
        elif line:
            self.answer(line)
        return True

    def answer(self, line: str) -> None:
        """One turn; a turn that fails leaves no trace in the conversation."""
        turn = {"role": "user", "content": line}
        question = session.Question(self.llm, [*self.messages, turn])
        try:
            answer = session.print_answer(question, self.params, self.num_draft_tokens)
        except PromptTooLongError as error:
            note(f"foredraft: the conversation no longer fits the model ({error}); /reset starts anew")
        except RequestError as error:
            note(f"foredraft: error: {error}")
        else:
            if answer.interrupted and not session.interactive():
                raise KeyboardInterrupt
            if answer.text.strip():
                self.messages += [turn, {"role": "assistant", "content": answer.text.strip()}]


def turn(conversation: Conversation) -> bool:
    """Read a line and react to it; Ctrl-C drops what was typed. False: the conversation is over."""
    interactive = session.interactive()
    try:
        return conversation.react(input("> " if interactive else ""))
    except EOFError:
        if interactive:
            sys.stdout.write("\n")
        return False
    except KeyboardInterrupt:
        if not interactive:
            raise
        note(f"\n{HELP}")
        return True


@contextmanager
def line_history() -> Iterator[None]:
    """Earlier lines under the arrow keys, kept between sessions, where the platform has readline."""
    if not session.interactive():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    path = history_file()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LENGTH)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


def history_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "foredraft" / "chat_history"
