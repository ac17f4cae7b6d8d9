"""Prompts to measure on: JSON lines in Spec-Bench's form, HumanEval's, GSM8K's, self-instruct's, or plain ones.

Owns what a line may say, and the tasks that come with the bundled pair. Knows nothing of models.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foredraft.errors import RequestError
from foredraft.llm import BUNDLED

BUNDLED_TASKS = BUNDLED / "tasks.jsonl"
PROMPTS = ("turns", "prompt", "question", "instruction", "text", "input")  # the first found is the prompt
SHOWN = 60  # characters of a value that is refused
REFERENCES = ("reference", "references", "canonical_solution", "answer", "output", "summary", "highlights")
MT_BENCH = "mt_bench"
MT_BENCH_PARTS = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)  # which Spec-Bench's table has as one column


@dataclass(frozen=True, slots=True)
class Task:
    """What a user says, turn by turn, and what a good answer to the last turn would be.

    `test` defines `check(candidate)`, as HumanEval has it; `entry_point` is the function it is called with. `chat` says
    whether turns go through the chat template (None: where there is one). `line` is where it stands in its file.
    """

    name: str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...] = ()
    test: str = ""
    entry_point: str = ""
    chat: bool | None = None
    line: int = 0


def bundled_tasks() -> tuple[Task, ...]:
    """Dialogues that neither model of the bundled pair was trained on."""
    return read_tasks(BUNDLED_TASKS)


def read_tasks(path: Path) -> tuple[Task, ...]:
    """All tasks of a .jsonl file (may be .gz).

    Raises:
        RequestError: it cannot be read, has no tasks, or a line is none; the message names the line.
    """
    path = path.expanduser()
    lines = _lines(path)
    tasks = tuple(_task(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not tasks:
        raise RequestError(f'{path} has no prompts; give JSON lines such as {{"turns": ["..."]}}')
    return tasks


def spread(tasks: Sequence[Task], most: int | None) -> tuple[Task, ...]:
    """At most so many, taken from all categories in turn, in their own order."""
    if most is None or most >= len(tasks):
        return tuple(tasks)
    ranks: dict[str, int] = {}
    ranked = []
    for index, task in enumerate(tasks):
        ranks[task.category] = ranks.get(task.category, -1) + 1
        ranked.append((ranks[task.category], index))
    return tuple(tasks[index] for index in sorted(index for _, index in sorted(ranked)[:most]))


def _lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"prompts cannot be read from {path}: {error}") from error
    return [_decoded(path, number, line) for number, line in enumerate(_without_mark(data).split(b"\n"), 1)]


def _without_mark(data: bytes) -> bytes:
    """Some editors begin a file with a mark, which is no part of it."""
    return data.removeprefix(codecs.BOM_UTF8)


def _decoded(path: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {line[error.start]:#04x} at {error.start}"
        raise RequestError(f"{path}, line {number} is not UTF-8 text ({where}); save the file as UTF-8") from error


def _task(path: Path, number: int, line: str) -> Task:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}, line {number} is not JSON ({error}): {line[:60]!r}") from error
    data = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(data, dict):
        raise RequestError(f"{path}, line {number} is no task: {_shown(value)}; it must be an object or a string")
    try:
        _check_text(value)
        return _made(data, number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}, line {number} is no task: {error}") from error


def _check_text(value: object) -> None:
    r"""Half a surrogate pair, as "\ud800", may stand in JSON and is no text. Raises ValueError."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(error.object[error.start]):04x} is half a pair, which is no character") from error


def _made(data: Mapping[str, Any], number: int) -> Task:
    """Raises ValueError, which says what is wrong with the line."""
    turns, test = _turns(data), _text(data, "test")
    named = next((data[key] for key in ("question_id", "task_id", "id") if data.get(key) is not None), number)
    category = _text(data, "category") or ("code" if test else "")
    chat = data.get("chat")
    if not isinstance(chat, bool | None):
        raise ValueError(f"chat is {_shown(chat)}; it must be true or false")
    if category in MT_BENCH_PARTS and len(turns) > 1:
        category = MT_BENCH
    return Task(
        str(named), category, turns, _references(data), test, _text(data, "entry_point"), chat=chat, line=number
    )


def _turns(data: Mapping[str, Any]) -> tuple[str, ...]:
    there = [name for name in PROMPTS if data.get(name) is not None]
    if not there:
        raise ValueError(f"it has no prompt; give it one of {', '.join(PROMPTS)}")
    key = next((name for name in there if data[name]), there[0])
    value = data[key]
    turns = [value] if isinstance(value, str) else value
    if turns == [] or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{key} is empty; it must be a text, or a list of texts")
    if not isinstance(turns, list) or not all(isinstance(it, str) and it.strip() for it in turns):
        raise ValueError(f"{key} is {_shown(value)}; it must be a text, or a list of texts that are not empty")
    inputs = [it.get("input") for it in _instances(data)][:1] if key == "instruction" else []
    return tuple("\n\n".join(filter(None, [turn, *inputs])) for turn in turns)


def _references(data: Mapping[str, Any]) -> tuple[str, ...]:
    values = [data.get(name) for name in REFERENCES] + [it.get("output") for it in _instances(data)]
    return tuple(text for value in values for text in _texts(value))


def _instances(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """self-instruct's: the inputs of an instruction, and what should come out."""
    found = data.get("instances")
    return [it for it in found if isinstance(it, dict)] if isinstance(found, list) else []


def _texts(value: object) -> Iterable[str]:
    if isinstance(value, str) and value.strip():
        yield value
    elif isinstance(value, list):
        yield from (it for it in value if isinstance(it, str) and it.strip())


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name} is {_shown(value)}; it must be a text")
    return value or ""


def _shown(value: object) -> str:
    """As JSON, so that a number looks like one."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
