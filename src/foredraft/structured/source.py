"""A form in the words of llguidance: how it is written there, what is looked at before, and where a fault is.

Knows no vocabulary.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from foredraft.errors import GrammarError
from foredraft.structured.spec import MAX_LITERAL, Structured

MOST_PARTS = 200  # of a schema, looked at one by one to find the fault
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength")
MOST_NUMBER = 2**53  # what JSON's readers agree on
DIGITS = 16  # of a number that is written as it is
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes
PATTERN_FAULT = re.compile(r"regex parse error:\n +(?P<pattern>.*)\n(?P<line> +)(?P<marks>\^+)\nerror: (?P<error>.*)")
INDENT = 4  # of a pattern that is shown
MAX_SYMBOLS = 40_000  # of a grammar; compiling takes time that grows with their square


def limits() -> Any:
    """What llguidance may spend on one grammar; for the lexer and the parser of a step its own defaults."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_grammar_size=MAX_SYMBOLS, verbose_errors=False)


def source_of(form: Structured) -> str:
    """What llguidance compiles.

    Raises:
        GrammarError: llguidance cannot read it, or would take it for something else.
    """
    from llguidance import LLMatcher

    _check_parts(form)
    if form.kind == "json_schema":
        try:
            return str(LLMatcher.grammar_from_json_schema(form.source, defaults=JSON_FORM))  # type: ignore[arg-type]  # a TypedDict
        except ValueError as error:
            raise GrammarError(f"the {form.name} cannot be compiled: {said(form, str(error))}") from error
    if form.kind == "regex":
        return str(LLMatcher.grammar_from_regex(form.source))
    if form.kind == "choice":
        return "start: OPTION\nOPTION: " + " | ".join(map(_quoted, json.loads(form.source)))
    return str(LLMatcher.grammar_from_lark(form.source))


def _quoted(text: str) -> str:
    """As llguidance's Lark writes it; it does not read DEL as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def literals(form: Structured) -> Iterator[str]:
    """Texts that a form names letter by letter."""
    if form.kind == "choice":
        yield from json.loads(form.source)
    elif form.kind == "json_schema":
        for _, part in islice(_parts(json.loads(form.source), "#"), MOST_PARTS):
            yield from (name for name in _named(part) if name.isprintable())


def guilty(root: Mapping[str, Any]) -> str:
    """The JSON pointer of the innermost part of a schema that does not compile by itself."""
    from llguidance import LLMatcher

    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    found = "#"
    for pointer, part in islice(_parts(root, "#"), MOST_PARTS):
        source = LLMatcher.grammar_from_json_schema({**definitions, **part}, defaults=JSON_FORM)  # type: ignore[arg-type]
        if pointer.startswith(found) and LLMatcher.validate_grammar(source, limits=limits()):
            found = pointer
    return found


def said(form: Structured, message: str) -> str:
    """What llguidance says of a form; of a pattern without the grammar that it was put into."""
    message = message.removesuffix("<non-verbose/>").strip()
    if form.kind != "regex":
        return message
    found = PATTERN_FAULT.search(message)
    if not found:
        return message.partition("\n   1 | ")[0]
    start, end = (found.span("marks")[i] - found.start("line") - INDENT for i in (0, 1))
    return f"{found['error']} at {found['pattern'][start:end]!r} in {form.source!r:.200}"


def _check_parts(form: Structured) -> None:
    """Raises GrammarError for a number that the compiler would round in silence, and a text that costs too much."""
    for pointer, part in _objects(json.loads(form.source), "#") if form.kind == "json_schema" else ():
        for name in BOUNDS:
            if type(part.get(name)) is int and abs(part[name]) > MOST_NUMBER:
                raise GrammarError(f"the {form.name} cannot be compiled at {pointer}/{name}: {part[name]} is too large")
        for number in _numbers([part.get("const"), part.get("enum")]):
            if isinstance(number, int) and abs(number) > MOST_NUMBER:
                raise GrammarError(f"the {form.name} cannot be compiled at {pointer}: {number} is too large")
            if float(f"{number:.{DIGITS}g}") != number:
                raise GrammarError(f"the {form.name} cannot be compiled at {pointer}: {number} has too many digits")
        longest = max(map(len, _named(part)), default=0)
        if longest > MAX_LITERAL:
            raise GrammarError(
                f"the {form.name} has a text of {longest:,} characters at {pointer}; at most {MAX_LITERAL:,} are taken"
            )


def _named(part: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a schema's part: its properties' names and what it may be."""
    properties, enum = part.get("properties"), part.get("enum")
    named = [*(properties if isinstance(properties, Mapping) else ()), *(enum if isinstance(enum, list) else ())]
    return (name for name in (*named, part.get("const")) if isinstance(name, str))


def _objects(value: Any, pointer: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every object of a schema with its pointer: a reference may lead to any of them."""
    if isinstance(value, Mapping):
        yield pointer, value
        for key, inner in value.items():
            if key not in ("const", "enum", "default", "examples"):
                yield from _objects(inner, f"{pointer}/{key}")
    for i, inner in enumerate(value if isinstance(value, list) else ()):
        yield from _objects(inner, f"{pointer}/{i}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in what a part of a schema may be."""
    if isinstance(value, (list, Mapping)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _parts(schema: Any, pointer: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within a schema with its pointer, the outer before the inner."""
    if not isinstance(schema, Mapping):
        return
    yield pointer, schema
    for name in ("properties", "patternProperties", "$defs", "definitions"):
        inner = schema.get(name)
        for key, part in inner.items() if isinstance(inner, Mapping) else ():
            yield from _parts(part, f"{pointer}/{name}/{key}")
    for name in ("items", "additionalProperties", "contains", "propertyNames", "not"):
        yield from _parts(schema.get(name), f"{pointer}/{name}")
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        inner = schema.get(name)
        for i, part in enumerate(inner if isinstance(inner, list) else ()):
            yield from _parts(part, f"{pointer}/{name}/{i}")
