"""Structured: what form an output must have, checked as far as that goes without a compiler."""

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args

from foredraft.errors import GrammarError, RequestError, SchemaWarning
from foredraft.structured.keywords import ignored
from foredraft.text.prompt import check_unicode

Kind = Literal["json_schema", "regex", "choice", "grammar"]
MAX_SOURCE = 1_000_000  # bytes
MAX_OPTIONS = 10_000
MAX_LITERAL = 10_000  # characters of a text that is given letter by letter; each is followed by copying what is left
WITHOUT_ROLLBACK = re.compile(
    r"^\s*[?!]*\w+\s*\[[^\]\n]*?\b(max_tokens|stop|stop_capture|suffix|temperature)\s*=", re.MULTILINE
)
MAX_NAME = 4096  # characters of a file's, with its folders
MAX_DEPTH = 200  # nested brackets; compilers recurse
JOINED = ("anyOf", "oneOf", "allOf")
LISTING = ("properties", "patternProperties", "$ref", *JOINED)  # where a schema may name properties
MAX_LEVELS = 124  # nested objects and lists of a JSON schema: its reader takes 127, and three are around it
JSON_TEXT = re.compile(r'"(?:\\.|[^"\\])*"')


@dataclass(frozen=True, slots=True)
class Structured:
    """The form of an output: a JSON schema, a regular expression, one of several strings, or a grammar.

    Made by the functions of these names. `source` is the schema as JSON, the pattern, the strings as JSON, or the
    grammar in llguidance's dialect of Lark.

    Raises:
        GrammarError: it is empty, malformed, larger than 1 MB or nested too deep.
    """

    kind: Kind
    source: str

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise GrammarError(f"kind={self.kind!r:.200} is not usable; one of {', '.join(get_args(Kind))}")
        _text(self.source, self.name)
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"the {self.name} is no Unicode text: {error.reason} at {error.start}") from None
        if size > MAX_SOURCE:
            raise GrammarError(
                f"the {self.name} has {size:,} bytes; at most {MAX_SOURCE:,} are compiled, make it smaller"
            )
        if not self.source.strip():
            raise GrammarError(f"the {self.name} is empty; say what the output must look like")
        if self.kind in ("json_schema", "choice"):
            self._check_json()
        depth = 0 if self.kind == "choice" else _depth(self.source)
        if depth > MAX_DEPTH:
            raise GrammarError(
                f"the {self.name} is nested {depth} deep; at most {MAX_DEPTH} are compiled, make it flatter"
            )

    def _check_json(self) -> None:
        """Raises GrammarError where it is not the JSON that it should be, or nested deeper than its reader takes."""
        parsed = _parse(self.source)
        if self.kind == "json_schema":
            usable = isinstance(parsed, dict)
        else:
            usable = isinstance(parsed, list) and bool(parsed) and all(map(_is_option, parsed))
        if not usable:
            raise GrammarError(
                f"source={self.source!r:.200} is not usable for kind={self.kind!r}; use Structured.{self.kind}"
            )
        levels = _depth(JSON_TEXT.sub("", self.source))
        if levels > MAX_LEVELS:
            raise GrammarError(
                f"the {self.name} is nested {levels} deep; at most {MAX_LEVELS} objects and lists within each other "
                "are compiled, give the inner ones names in $defs and refer to them"
            )

    @property
    def name(self) -> str:
        """What messages call this form."""
        return {"json_schema": "JSON schema", "regex": "regular expression"}.get(self.kind, self.kind)

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any] | type) -> "Structured":
        """From a dict, JSON text, or a pydantic model's class; the output's members come in the schema's order.

        Of a pydantic model only its fields are generated, unless its configuration says extra="allow". Keywords that
        JSON schema does not know are ignored, with a `SchemaWarning`.
        """
        _check_no_file(schema, "JSON schema")
        form = cls.of_schema(schema)
        told = ignored(json.loads(form.source))
        if told:
            warnings.warn(told, SchemaWarning, stacklevel=2)
        return form

    @classmethod
    def of_schema(cls, schema: str | Mapping[str, Any] | type) -> "Structured":
        """As `json_schema`, without a word about files or keywords that mean nothing: for schemas of strangers."""
        if isinstance(schema, str):
            parsed = _parse(schema)
        elif hasattr(schema, "model_json_schema"):
            parsed = _closed(schema.model_json_schema())
        else:
            parsed = schema
        if not isinstance(parsed, Mapping):
            raise GrammarError(
                f"the JSON schema {parsed!r:.200} is no object; give a dict, its JSON, a pydantic model, or "
                "pydantic.TypeAdapter(...).json_schema() of another type"
            )
        try:
            source = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the schema cannot be written as JSON: {error}") from error
        return cls("json_schema", source)

    @classmethod
    def regex(cls, pattern: str) -> "Structured":
        """The whole output matches; Rust's syntax, without look-around and back references."""
        return cls("regex", _text(pattern, "regular expression"))

    @classmethod
    def choice(cls, options: Sequence[str]) -> "Structured":
        """The output is one of these strings."""
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise GrammarError(f"choice={options!r:.200} is not usable; give a list of at least one string")
        if len(options) > MAX_OPTIONS:
            raise GrammarError(f"choice has {len(options):,} strings; at most {MAX_OPTIONS:,} are compiled")
        if not all(map(_is_option, options)):
            raise GrammarError(f"choice={options!r:.200} is not usable; give strings with something in them")
        try:
            check_unicode(list(options), "choice")
        except RequestError as error:
            raise GrammarError(str(error)) from None
        longest = max(map(len, options))
        if longest > MAX_LITERAL:
            raise GrammarError(f"choice has a string of {longest:,} characters; at most {MAX_LITERAL:,} are compiled")
        return cls("choice", json.dumps(list(options)))

    @classmethod
    def grammar(cls, lark: str) -> "Structured":
        """The output is derived from the rule `start`; rules may not count tokens or hide their ends."""
        _check_no_file(lark, "grammar")
        return cls.of_grammar(lark)

    @classmethod
    def of_grammar(cls, lark: str) -> "Structured":
        """As `grammar`, without a look at files: for grammars of strangers, who may not learn which ones there are."""
        found = WITHOUT_ROLLBACK.search(_text(lark, "grammar"))
        if found:
            raise GrammarError(
                f"the grammar uses {found[1]}=, which cannot be rolled back; bound the text with a "
                "pattern such as /[a-z]{1,20}/ instead"
            )
        return cls("grammar", lark)

    @classmethod
    def of(cls, value: object) -> "Structured":
        """As it is, or a JSON schema given directly."""
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping) or hasattr(value, "model_json_schema"):
            return cls.json_schema(value)  # type: ignore[arg-type]  # a mapping or a pydantic class
        raise GrammarError(
            f"structured={value!r:.200} is not usable; give a JSON schema (a dict, a pydantic model, or "
            "pydantic.TypeAdapter(...).json_schema() of another type), Structured.regex, Structured.choice, "
            "Structured.grammar or Structured.json_schema of something"
        )


def closing(schema: Mapping[str, Any]) -> dict[str, Any]:
    """What closes a schema to other properties: where it lists some, and nothing beside them may list more."""
    joined = [part for key in JOINED if isinstance(schema.get(key), list) for part in schema[key]]
    more = any(key in part for part in joined if isinstance(part, Mapping) for key in LISTING)
    if "properties" not in schema or "additionalProperties" in schema or "$ref" in schema or more:
        return {}
    return {"additionalProperties": False}


def _closed(schema: Any) -> Any:
    """A schema of pydantic's, closed to other properties wherever it can be."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = closing(schema)
    same = JOINED if "properties" in schema else ("allOf",)  # parts that hold for one object, with others
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            closed[key] = {name: _closed(part) for name, part in value.items()}
        else:
            closed[key] = value if key in ("const", "enum", "default", "examples", *same) else _closed(value)
    return closed


def _check_no_file(given: object, what: str) -> None:
    """Raises GrammarError for the name of a file where its text is wanted."""
    if isinstance(given, PurePath) or (isinstance(given, str) and _names_file(given)):
        name = str(given)
        raise GrammarError(
            f"the {what} {name!r:.200} is the name of a file; give its text: Path({name!r:.200}).read_text()"
        )


def _names_file(text: str) -> bool:
    if len(text) > MAX_NAME or any(mark in text for mark in "{}\n"):
        return False
    return (text.endswith((".json", ".lark")) and not re.search(r"\s", text)) or os.path.isfile(text)


def _is_option(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise GrammarError(f"the {name} {value!r:.200} is no text")
    return value


def _parse(text: str) -> Any:
    if len(text) > MAX_SOURCE:
        raise GrammarError(f"the JSON schema has {len(text):,} characters; at most {MAX_SOURCE:,} are compiled")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise GrammarError(f"the schema is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise GrammarError(f"the JSON schema is nested too deep; at most {MAX_DEPTH} are compiled") from None


def _depth(source: str) -> int:
    """The deepest nesting of brackets; those in strings count too, which errs on the safe side."""
    deepest = depth = 0
    for char in source:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(0, depth - 1)
    return deepest
