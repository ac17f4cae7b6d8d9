"""From a model's answer to a program that tests itself. Knows nothing of how it is run.

A completion is cut as Draft & Verify cut it: the first block, up to an empty line. An answer in a code block is taken
as it stands. The test is the task's own (HumanEval's `check`), else the examples in the prompt's docstring.
"""

import re

from foredraft.bench.tasks import Task

DOCSTRING = re.compile(r"(\"\"\"|\'\'\')(.*?)\1", re.DOTALL)
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"^(?:from |import |def |class |@|async def )", re.MULTILINE)
NAME = re.compile(r"^def (\w+)", re.MULTILINE)
IMPORTS = "from typing import Any, Dict, List, Optional, Set, Tuple, Union\n"  # which copies of HumanEval lack
DOCTEST = """
import doctest as _doctest
_examples = _doctest.DocTestParser().get_doctest({text!r}, globals(), "examples", None, 0)
_runner = _doctest.DocTestRunner(verbose=False)
_runner.run(_examples, out=lambda text: None)
assert _runner.tries and not _runner.failures, "examples failed"
"""


def has_test(task: Task) -> bool:
    return bool(_name(task)) and bool(task.test or ">>>" in task.turns[0])


def program(task: Task, answer: str, *, reference: bool = False) -> str:
    """The answer as a program that ends without an error if it passes the task's test. A reference is not cut."""
    stub, code = _stub(task), answer.replace("\t", "    ")
    fenced = FENCED.search(code)
    if fenced:
        code = fenced[1]
    if _name(task) in NAME.findall(code):  # all of the function anew
        body = f"{stub[: _last_function(stub)]}\n{code}"
    else:
        body = stub.rstrip() + "\n" + (code if fenced or reference else _first_block(code))
    return f"{IMPORTS}{body}\n{_test(task, stub)}"


def _last_function(stub: str) -> int:
    """Where the last function of the prompt begins; before it stand imports and helpers."""
    return max((match.start() for match in NAME.finditer(stub)), default=0)


def _first_block(completion: str) -> str:
    return completion.lstrip("\n").split("\n\n")[0]


def _stub(task: Task) -> str:
    """The code in the prompt."""
    prompt = task.turns[0]
    begins = CODE.search(prompt)
    return prompt[begins.start() :] if begins else ""


def _name(task: Task) -> str:
    names = NAME.findall(_stub(task))
    return task.entry_point or (names[-1] if names else "")


def _test(task: Task, stub: str) -> str:
    if task.test:
        return f"{task.test}\ncheck({_name(task)})\n"
    examples = "\n".join(match[2] for match in DOCSTRING.finditer(stub))
    return DOCTEST.format(text=examples)
