"""A form in the words of llguidance: how it is written there, what is looked at before, and where a fault is.

Knows no vocabulary.
"""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from foredraft.errors import GrammarError
from foredraft.structured.keywords import parts
from foredraft.structured.spec import MAX_LITERAL, Structured

MOST_PARTS = 200  # of a schema, looked at one by one to find the fault
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength")
MOST_NUMBER = 2**53  # what JSON's readers agree on
DIGITS = 16  # of a number that is written as it is
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # as json.dumps writes
PATTERN_FAULT = re.compile(r"regex parse error:\n +(?P<pattern>.*)\n(?P<line> +)(?P<marks>\^+)\nerror: (?P<error>.*)")
INDENT = 4  # of a pattern that is shown
IN_GRAMMAR = re.compile(r"^at \d+\(\d+\): invalid regex .* \(in regex\): ", re.DOTALL)
REFUSED = r"/((?s:.*?))/(?=\s*$|\n +\d+ \| )"  # a pattern as llguidance quotes it, before lines of a grammar
ADVICE = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (
            r"^oneOf constraints are not supported.*",
            "oneOf whose parts overlap is not supported; write anyOf, or "
            '"x-guidance": {"coerce_one_of": true} at the root of the schema, which takes each oneOf for an anyOf',
        ),
        (
            r'^Unimplemented keys: \["uniqueItems"\]',
            'not supported: "uniqueItems"; leave it out (in pydantic: take list, not set) and check the answer for it',
        ),
        (r"^Unimplemented keys: \[(.*)\]", r"not supported: \1; leave them out and check the answer for them"),
        (
            r"^Invalid type: (\S+)$",
            r"Invalid type: \1; types are string, number, integer, boolean, null, object and array",
        ),
        (
            r"^Resource '(.*)' is not present in a registry.*",
            r"'\1' is another document, and none is fetched; put it into $defs and refer to it there",
        ),
        (r"^Expected f64 for '(.*)', got (.*)", r"\1 is \2; give a number"),
        (
            r"^Unknown format: (.*)",
            r"the format '\1' is not known; leave it out (in pydantic: take str, not bytes or Path), or write it as a "
            "pattern",
        ),
        (
            r"lookarounds not supported yet; Word(?:Unicode|Ascii)(Negate)? in regex " + REFUSED,
            r"word boundaries (\\b, \\B) are not supported, in \2; leave them out",
        ),
        (
            r"lookarounds not supported yet; (?:Start|End)\w* in regex " + REFUSED,
            r"^ and $ may stand at the ends of a pattern only, in \1; leave out the others, and (?m)",
        ),
        (
            r"recursion limit exceeded at line.*",
            "a %json is nested too deep; at most 126 objects and lists within each other are compiled, give the inner "
            "ones names in $defs and refer to them",
        ),
        (r"lark grammar too deeply nested", "the brackets are nested too deep; give the inner ones rules of their own"),
        (
            r"grammar size \(number of symbols\) too big \(limit for this grammar: (\d+)\)",
            r"it has too many symbols, at most \1 are compiled; make it smaller",
        ),
    )
)
MANY_WAYS = re.compile(r"^(?:Parser Error: )?Current row has (\d+) items; max is (\d+).*")
TOO_MANY = r"it has too many ways to go on (\1; at most \2)"
SIMPLER = (
    ": in a grammar fewer alternatives or left recursion, in a JSON schema fewer optional properties, more required "
    "ones, or some in an object of their own"
)
MOST_LINE = 300  # characters of a line of a message, which may quote the source
MOST_SAID = 800
MAX_OPTIONAL = 1000  # properties of an object; each is at least two of the 2,000 ways to go on that are followed
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
        for _, part in islice(parts(json.loads(form.source)), MOST_PARTS):
            yield from (name for name in _named(part) if name.isprintable())


def guilty(root: Mapping[str, Any]) -> str:
    """The JSON pointer of the innermost part of a schema that does not compile by itself."""
    from llguidance import LLMatcher

    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    found = "#"
    for pointer, part in islice(parts(root), MOST_PARTS):
        source = LLMatcher.grammar_from_json_schema({**definitions, **part}, defaults=JSON_FORM)  # type: ignore[arg-type]
        if pointer.startswith(found) and LLMatcher.validate_grammar(source, limits=limits()):
            found = pointer
    return found


def said(form: Structured, message: str) -> str:
    """What llguidance says of a form and what to do; of a pattern without the grammar that it was put into."""
    message = message.removesuffix("<non-verbose/>").strip()
    if form.kind == "regex":
        message = _of_pattern(form.source, message)
    for pattern, advice in ADVICE:
        message = pattern.sub(advice, message, count=1)
    lines = (line[:MOST_LINE] + " ..." * (len(line) > MOST_LINE) for line in message.splitlines())
    return "\n".join(lines)[:MOST_SAID]


def _of_pattern(source: str, message: str) -> str:
    found = PATTERN_FAULT.search(message)
    if not found:
        return IN_GRAMMAR.sub("", message.partition("\n   1 | ")[0])
    start, end = (found.span("marks")[i] - found.start("line") - INDENT for i in (0, 1))
    return f"{found['error']} at {found['pattern'][start:end]!r} in {source!r:.200}"


def followed(message: str) -> str:
    """What llguidance says where it gives a text up, and what to do."""
    told = message.removesuffix("<non-verbose/>").strip()
    return MANY_WAYS.sub(TOO_MANY, told) + "; make it simpler" + (SIMPLER if MANY_WAYS.match(told) else "")


def _check_parts(form: Structured) -> None:
    """Raises GrammarError for a number that the compiler would round in silence, and what costs too much."""
    if form.kind != "json_schema":
        return
    schema = json.loads(form.source)
    required = {name for _, part in _objects(schema, "#") for name in _texts(part.get("required"))}
    for pointer, part in _objects(schema, "#"):
        for name in BOUNDS:
            if type(part.get(name)) is int and abs(part[name]) > MOST_NUMBER:
                raise GrammarError(
                    f"the {form.name} cannot be compiled at {pointer}/{name}: {part[name]} is too "
                    "large; at most 2**53 is compiled"
                )
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and multiple <= 0:
            raise GrammarError(f"the {form.name} cannot be compiled at {pointer}/multipleOf: {multiple} is not above 0")
        properties = part.get("properties")
        optional = len(properties.keys() - required) if isinstance(properties, Mapping) else 0
        if optional > MAX_OPTIONAL:
            raise GrammarError(
                f"the {form.name} has {optional:,} optional properties at {pointer}; at most {MAX_OPTIONAL:,} can be "
                "followed: require them, or put some into an object of their own"
            )
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


def _texts(value: Any) -> Iterator[str]:
    return (one for one in (value if isinstance(value, list) else ()) if isinstance(one, str))


def _named(part: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a schema's part: its properties' names and what it may be."""
    properties, enum = part.get("properties"), part.get("enum")
    return _texts([*(properties if isinstance(properties, Mapping) else ()), *_texts(enum), part.get("const")])


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
