"""Renews docs/api.md from the code: every public name with its signature and the first line of its docstring.

    python scripts/api_page.py

Owns the part of the page between its two marks; a test holds it against the code.
"""

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import foredraft
from foredraft import errors
from foredraft.drafters.base import Drafter
from foredraft.integrations import transformers as drop_in
from foredraft.policy import DraftPolicy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
MARKED = re.compile(r"(<!-- names -->\n).*?(<!-- end -->)", re.DOTALL)
Definition = ast.FunctionDef | ast.ClassDef


def embed(page: str) -> str:
    """The page with its list of names renewed."""
    return MARKED.sub(lambda match: f"{match[1]}\n{names()}\n\n{match[2]}", page)


def names() -> str:
    """Everything public, by the module it is imported from."""
    own = {name: getattr(foredraft, name) for name in sorted(foredraft.__all__, key=str.lower)}
    sections = {
        "foredraft": own,
        "foredraft.drafters.base and foredraft.policy": {"Drafter": Drafter, "DraftPolicy": DraftPolicy},
        "foredraft.integrations.transformers": {name: getattr(drop_in, name) for name in drop_in.__all__},
        "foredraft.client": classes_of(Path(foredraft.__file__).with_name("client.py")),
        "foredraft.errors": {n: e for n, e in vars(errors).items() if getattr(e, "__module__", "") == errors.__name__},
    }
    return "\n\n".join(f"### {title}\n\n{table(found)}" for title, found in sections.items())


def table(objects: dict[str, Any]) -> str:
    rows = ["| name | what it is |", "|---|---|"]
    for name, found in objects.items():
        if isinstance(found, str):
            rows.append(f"| `{name}` | a text |")
            continue
        rows.append(row(name, definition(found)))
        if isinstance(found, ast.ClassDef) or (isinstance(found, type) and not issubclass(found, Exception)):
            rows += [row(f"{name}.{node.name}", node) for node in members(definition(found))]
    return "\n".join(rows)


def classes_of(file: Path) -> dict[str, ast.ClassDef]:
    """Of a module that cannot be imported everywhere."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}


def definition(found: Any) -> Definition:
    """Its source, parsed: written the same by every version of Python."""
    if isinstance(found, Definition):
        return found
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    assert isinstance(node, Definition)
    return node


def members(node: Definition) -> list[ast.FunctionDef]:
    """Public methods and properties, each once however often it is overloaded."""
    found = [it for it in node.body if isinstance(it, ast.FunctionDef) and not it.name.startswith("_")]
    return list({it.name: it for it in found}.values())


def row(name: str, node: Definition) -> str:
    lines = (ast.get_docstring(node) or "").split("\n\n")[0]
    text = " ".join(lines.split()).replace("|", "\\|")
    return f"| `{(name + arguments(node)).replace('|', chr(92) + '|')}` | {text} |"


def arguments(node: Definition) -> str:
    """In parentheses, without types: of a function, a class by its `__init__`, or a dataclass by its fields."""
    if isinstance(node, ast.ClassDef):
        init = next((it for it in node.body if isinstance(it, ast.FunctionDef) and it.name == "__init__"), None)
        return arguments(init) if init else fields(node)
    if any(isinstance(it, ast.Name) and it.id == "property" for it in node.decorator_list):
        return ""
    args = node.args
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    if args.args and args.args[0].arg in ("self", "cls"):
        del args.args[0]
    return f"({ast.unparse(args)})"


def fields(node: ast.ClassDef) -> str:
    found = [it for it in node.body if isinstance(it, ast.AnnAssign)]
    return f"({', '.join(ast.unparse(it.target) for it in found)})" if found else ""


if __name__ == "__main__":
    PAGE.write_text(embed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
