"""The parts of a JSON schema, and keywords in them that mean nothing, which readers of schemas ignore."""

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

MAPS = ("properties", "patternProperties", "$defs", "definitions")  # of schemas by name
LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "contains", "propertyNames", "not")
RULES = (
    *MAPS, *LISTS, *SINGLE, "$ref", "$dynamicRef", "$recursiveRef", "additionalItems", "const", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "if",
    "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems", "minLength",
    "minProperties", "minimum", "multipleOf", "pattern", "required", "then", "type", "unevaluatedItems",
    "unevaluatedProperties", "uniqueItems",
)  # fmt: skip
NOTES = (
    "$anchor", "$comment", "$dynamicAnchor", "$id", "$recursiveAnchor", "$schema", "$vocabulary", "contentEncoding",
    "contentMediaType", "contentSchema", "default", "deprecated", "description", "discriminator", "example",
    "examples", "externalDocs", "id", "readOnly", "title", "writeOnly", "xml",
)  # fmt: skip
KNOWN = frozenset((*RULES, *NOTES))
MOST_TOLD = 3


def parts(schema: Any, pointer: str = "#") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema within a schema with its pointer, the outer before the inner."""
    if not isinstance(schema, Mapping):
        return
    yield pointer, schema
    for name in MAPS:
        inner = schema.get(name)
        for key, part in inner.items() if isinstance(inner, Mapping) else ():
            yield from parts(part, f"{pointer}/{name}/{key}")
    for name in SINGLE:
        yield from parts(schema.get(name), f"{pointer}/{name}")
    for name in LISTS:
        inner = schema.get(name)
        for i, part in enumerate(inner if isinstance(inner, list) else ()):
            yield from parts(part, f"{pointer}/{name}/{i}")


def ignored(schema: Mapping[str, Any]) -> str:
    """What to say of keywords that no version of JSON schema knows; empty where there are none.

    Notes, names beginning with x-, and what a reference leads into are meant to be there.
    """
    written = json.dumps(schema, ensure_ascii=False)
    found = [
        (name, pointer)
        for pointer, part in parts(schema)
        for name in part
        if name not in KNOWN and not name.startswith("x-") and f'"{pointer}/{name}' not in written
    ]
    if not found:
        return ""
    told = ", ".join(f"{name!r:.80} at {pointer:.100}{_near(name)}" for name, pointer in found[:MOST_TOLD])
    more = f" and {len(found) - MOST_TOLD:,} more" if len(found) > MOST_TOLD else ""
    return f"the JSON schema has keywords that JSON schema does not know, which are ignored: {told}{more}"


def _near(name: str) -> str:
    by_lower = {known.lower(): known for known in RULES}
    near = get_close_matches(name.lower()[:80], by_lower, n=1, cutoff=0.7)
    return f" (did you mean {by_lower[near[0]]!r}?)" if near else ""
