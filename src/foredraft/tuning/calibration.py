"""The text that drafters are scored on: prompts, and how the target continues them.

Whether drafts are accepted depends on what the target would write, so a user's file only gives prompts (its lines, or
the openings of its passages) and the target continues each. Without a file the model makes up the prompts as well. Some
prompts are held out, to confirm the result on text that was not used to find it.
"""

import gzip
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foredraft.errors import RequestError
from foredraft.llm import LLM, Prompt
from foredraft.text import encode_text, render_chat
from foredraft.types import SamplingParams

SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")
FIELDS = ("prompt", "turns", "question", "instruction", "text", "content", "input")  # of a JSON line, the first found
PROMPT_TOKENS = 32  # of a passage's opening, or of a prompt that the model makes up
MAX_PROMPT_TOKENS = 512
OPENINGS = (
    "Explain how a bicycle stays upright.",
    "Write a short story about a lighthouse keeper.",
    "What should I cook tonight with rice, eggs and spinach?",
    "Summarize the plot of Romeo and Juliet.",
    "Write a Python function that checks whether a string is a palindrome.",
    "What are the main causes of inflation?",
    "Give me a packing list for a week in the mountains.",
    "Translate 'The early bird catches the worm' into French and explain it.",
    "How does a vaccine work?",
    "Write an email asking a colleague for a report by Friday.",
    "List five facts about the planet Saturn.",
    "A train leaves at 9:40 and arrives at 13:15. How long is the trip?",
    "Compare solar and wind power.",
    "Write a SQL query that finds duplicate e-mail addresses.",
    "Describe the water cycle for a ten-year-old.",
    "What makes a good job interview?",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and the target's continuation of it."""

    token_ids: tuple[int, ...]
    prompt_len: int
    seed: int

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.token_ids[: self.prompt_len]

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Samples, the longest output first, and the parameters they were made with."""

    samples: tuple[Sample, ...]
    params: SamplingParams

    def params_of(self, sample: Sample) -> SamplingParams:
        return replace(self.params, seed=sample.seed)

    def every(self, stride: int) -> "CalibrationText":
        """Each `stride`-th sample."""
        return replace(self, samples=self.samples[::stride])

    @property
    def fingerprint(self) -> str:
        """A hash of the samples, to see that a resumed search scores on the same text."""
        text = json.dumps([(it.token_ids, it.prompt_len, it.seed) for it in self.samples])
        return hashlib.sha256(f"{text}{self.params}".encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token ids of the prompts to calibrate on, and of those held out to confirm with."""

    calibration: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]


def pick_prompts(llm: LLM, path: Path | None, count: int, held_out: int, *, seed: int = 0) -> Prompts:
    """`count` prompts to calibrate on and others held out, from a file or folder, or of the model's own making.

    If there are fewer prompts than asked for, the held-out ones are picked first, but at most half of all.

    Raises:
        RequestError: nothing readable there, or not two different prompts.
    """
    room = max(4, llm.max_model_len // 2)
    texts = _own_prompts(llm, count + held_out, seed) if path is None else list(read_prompts(path))
    if path is not None:
        random.Random(seed).shuffle(texts)
    found: dict[tuple[int, ...], None] = {}
    for text in texts:
        ids = _encode(llm, text)[: min(room, MAX_PROMPT_TOKENS)]
        if ids:
            found.setdefault(tuple(ids))
        if len(found) == count + held_out:
            break
    if len(found) < 2:
        raise RequestError(
            f"{path} gives {len(found)} different prompts; at least 2 are needed, {2 * count} are wanted"
        )
    prompts = list(found)
    held = min(held_out, len(prompts) // 2)
    return Prompts(tuple(prompts[held:]), tuple(prompts[:held]))


def continue_prompts(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int = 0
) -> CalibrationText:
    """Let the target continue each prompt.

    Raises:
        RequestError: it ends every text at once, which leaves nothing to score.
    """
    each = [replace(params, seed=seed + i) for i in range(len(prompts))]
    batch: list[Prompt] = [list(prompt) for prompt in prompts]
    results = llm.generate(batch, each, num_draft_tokens=0)
    samples = [
        Sample((*result.prompt_token_ids, *result.token_ids), len(result.prompt_token_ids), result.seed)
        for result in results
    ]
    samples = sorted((it for it in samples if it.num_output > 1), key=lambda it: -it.num_output)
    if not samples:
        raise RequestError("the model ends its text at once after every calibration prompt; give others")
    return CalibrationText(tuple(samples), params)


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document, of which only the opening becomes a prompt."""

    text: str


def read_prompts(path: Path) -> Iterator[str | Passage]:
    """Prompts of JSON lines, passages (between blank lines) of text files; a folder is read file by file.

    Raises:
        RequestError: no such file, none of a known kind, or a line that is not JSON or has no known field.
    """
    path = path.expanduser()
    if not path.exists():
        raise RequestError(f"no calibration text at {path}: the path does not exist")
    files = [path] if path.is_file() else sorted(it for it in path.rglob("*") if it.name.endswith(SUFFIXES))
    if not files:
        raise RequestError(f"{path} has no calibration text; its files must end in one of {', '.join(SUFFIXES)}")
    for file in files:
        text = _read(file)
        yield from _json_prompts(file, text) if ".jsonl" in file.suffixes else _passages(text)


def _read(file: Path) -> str:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return data.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RequestError(f"calibration text {file} cannot be read: {error}") from error


def _passages(text: str) -> Iterator[Passage]:
    for passage in text.replace("\r\n", "\n").split("\n\n"):
        if passage.strip():
            yield Passage(passage.strip())


def _json_prompts(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = _field(json.loads(line))
        except ValueError:
            prompt = None
        if prompt is None:
            raise RequestError(
                f"{file}, line {number} has no prompt: {line[:60]!r}; each line must be a JSON string, or an object "
                f"with one of {', '.join(FIELDS)}"
            )
        yield prompt


def _field(value: Any) -> str | None:
    """The first text in a JSON value: itself, a list's first, or that of an object's first known field."""
    if isinstance(value, list) and value:
        return _field(value[0])
    if isinstance(value, dict):
        return _field(next((value[name] for name in FIELDS if value.get(name)), None))
    return value if isinstance(value, str) and value else None


def _encode(llm: LLM, text: str | Passage | list[int]) -> list[int]:
    if isinstance(text, list):
        return text
    if isinstance(text, Passage):
        ids = llm.tokenizer(text.text, verbose=False)["input_ids"]
        return list(ids[: min(PROMPT_TOKENS, max(4, len(ids) // 2))])
    if llm.tokenizer.chat_template:
        return render_chat(llm.tokenizer, [{"role": "user", "content": text}])
    return encode_text(llm.tokenizer, text)


def _own_prompts(llm: LLM, count: int, seed: int) -> list[str | Passage | list[int]]:
    """Prompts that the model samples: from its first token, or the beginning of an answer for a chat model."""
    first = [[_first_token(llm)]] * count
    if llm._tokenizer is not None and llm._tokenizer.chat_template:
        first = [_encode(llm, OPENINGS[i % len(OPENINGS)]) for i in range(count)]
    params = SamplingParams(temperature=1.0, max_new_tokens=PROMPT_TOKENS, ignore_eos=True)
    each = [replace(params, seed=seed + i) for i in range(count)]
    return [[*it.prompt_token_ids, *it.token_ids] for it in llm.generate(list(first), each, num_draft_tokens=0)]


def _first_token(llm: LLM) -> int:
    """The token that a text begins with: bos if the model has one, otherwise eos."""
    for name in ("bos_token_id", "eos_token_id"):
        for source in (llm._tokenizer, llm.model.generation_config, llm.model.config):
            found = getattr(source, name, None)
            found = found[0] if isinstance(found, list) else found
            if isinstance(found, int):
                return found
    return 0
