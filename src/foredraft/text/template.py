"""A chat template that a user gives in place of the model's own: a file, or its text."""

import json
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from foredraft.errors import RequestError
from foredraft.reading import read_up_to

MOST_BYTES = 2**20
HELLO = [[{"role": "user", "content": "Hello"}]]


def read_template(given: object) -> str:
    """The text of a Jinja template: of a file, or itself where it is more than a name (a brace or a line break in it).

    Raises:
        RequestError: the file cannot be read, or what is in it is no chat template.
    """
    if not isinstance(given, str | Path):
        raise RequestError(
            f"chat_template={given!r:.200} is not usable; give a file with a Jinja template, or its text"
        )
    if isinstance(given, str) and not given.strip():
        raise RequestError(f"chat_template={given!r:.200} is empty; give a file with a Jinja template, or its text")
    if isinstance(given, str) and any(mark in given for mark in "{\n"):
        text, named = given, "the chat template"
    else:
        text, named = _read(Path(given)), f"chat_template={str(given)!r}"
    if _is_object(text):
        raise RequestError(f"{named} is JSON; a template is Jinja: give what stands under its 'chat_template' alone")
    if "messages" not in text or "{" not in text:
        raise RequestError(f"{named} is no chat template: nothing in it writes the messages; give one in Jinja")
    _check_syntax(text, named)
    return text


def _read(path: Path) -> str:
    try:
        text = read_up_to(path.expanduser(), MOST_BYTES)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or "it is not UTF-8 text"
        advice = "give a file with a Jinja template"
        raise RequestError(f"chat_template={str(path)!r:.200} cannot be read: {told}; {advice}") from error
    if text is None:
        raise RequestError(f"chat_template={str(path)!r} has more than {MOST_BYTES / 2**20:g} MiB; give a smaller one")
    return text


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_syntax(text: str, named: str) -> None:
    """By rendering a greeting, since templates have tags of transformers'; they may have demands that it lacks."""
    try:
        render_jinja_template(HELLO, chat_template=text)
    except TemplateSyntaxError as error:
        told = str(error.message).rstrip(".")
        raise RequestError(f"{named} is malformed in line {error.lineno}: {told}; correct it there") from error
    except Exception:  # a template is somebody's program and may raise anything; a chat will say what is wrong
        return
