"""From a model's answer to a program that tests itself. Knows nothing of how it is run.

A completion is cut as Draft & Verify cut it: the first block, up to an empty line. An answer in a code block is taken
as it stands. The test is the task's own (HumanEval's `check`), else the examples in the prompt's docstring.
"""

import re

from foredraft.bench.tasks import Task

FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
CODE = re.compile(r"^(?:from |import |def |class |@|async def )", re.MULTILINE)
NAME = re.compile(r"^def (\w+)", re.MULTILINE)
DOCTEST = """
import doctest as _doctest
_examples = _doctest.DocTestParser().get_doctest({text!r}, globals(), "examples", None, 0)
_runner = _doctest.DocTestRunner(verbose=False)
_runner.run(_examples, out=lambda text: None)
assert _runner.tries and not _runner.failures, "examples failed"
"""


def testable(task: Task) -> bool:
    return bool(_name(task)) and bool(task.test or ">>>" in task.turns[0])


def program(task: Task, answer: str) -> str:
    """The answer as a program that ends without an error if it passes the task's test."""
    stub, code = _stub(task), answer.replace("\t", "    ")
    fenced = FENCED.search(code)
    if fenced:
        code = fenced[1]
    whole = any(name == _name(task) for name in NAME.findall(code))
    if whole:
        body = f"{stub[: _last_function(stub)]}\n{code}"
    else:
        body = stub.rstrip() + "\n" + (code if fenced else _first_block(code))
    return f"{body}\n{_test(task, stub)}"


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
    return f"{task.test}\ncheck({_name(task)})\n" if task.test else DOCTEST.format(text=stub)
