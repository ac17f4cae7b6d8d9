"""Make the tasks that come with `foredraft bench`: dialogues of the test split, which neither bundled model has seen.

    python scripts/bench_tasks.py ../shared/data/sgd_test.txt.gz src/foredraft/bundled/tasks.jsonl

Owns the choice: so many dialogues of each kind, drawn with a fixed seed. `opening`, `middle` and `late` are transcripts
that break off before the assistant's first, third or sixth turn, to be gone on from as they stand; `conversation` holds
the first user's turns of a dialogue, each answered through the chat template.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EACH = 12
TRANSCRIPTS = {"opening": 1, "middle": 3, "late": 6}  # user's turns
TURNS = 3  # of a conversation


def dialogues(path: Path) -> list[list[str]]:
    """Lines `User: ...` and `Assistant: ...`, in turn."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8")
    return [block.splitlines() for block in text.split("\n\n") if block.strip()]


def tasks(found: list[list[str]]) -> Iterator[dict[str, Any]]:
    source = iter(found)
    for category, turns in TRANSCRIPTS.items():
        for _ in range(EACH):
            lines = next(it for it in source if len(it) >= 2 * turns + 4)[: 2 * turns - 1]
            yield {"category": category, "turns": ["\n".join([*lines, "Assistant:"])], "chat": False}
    for _ in range(EACH):
        lines = next(it for it in source if len(it) >= 2 * TURNS)
        yield {"category": "conversation", "turns": [it.removeprefix("User: ") for it in lines[: 2 * TURNS : 2]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="sgd_test.txt.gz, dialogues separated by blank lines")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    found = dialogues(args.data)
    random.Random(0).shuffle(found)
    lines = [json.dumps({"question_id": i} | task) for i, task in enumerate(tasks(found))]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
