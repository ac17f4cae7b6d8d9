"""foredraft, llama.cpp, OpenVINO GenAI and transformers on the same models and prompts, plain and drafting, in turn.

    python benchmarks/peers/prepare.py && python benchmarks/peers/run.py
    python benchmarks/peers/prepare.py --shape 344M && python benchmarks/peers/run.py --shape 344M --max-new-tokens 48

A worker a time: engines that stay alive beside each other disturb one another. Each run loads, decodes one prompt to
warm up and then all of them, greedy, batch 1; loading is not timed. Reports tokens a second, and how many texts of an
engine change when its drafting is switched on. Refuses to start on a machine that is busy with something else.

A worker reads one job from stdin: {"target", "draft" ("" for none), "prompts" [[token ids]], "max_new_tokens",
"num_draft_tokens", "threads", "context", "dtype"}, and answers with {"results": [{"output", "tokens", "seconds"}],
"version"}.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _timing import interleave, paired_ratio, parser, report, summary
from demo import OPENINGS
from prepare import HERE, RUNS, Pair, add_flags, pair, python
from tokenizers import Tokenizer

LOOKUP = "transformers_lookup"  # transformers again, with prompt lookup instead of the draft model
ENGINES = ("foredraft", "llama_cpp", "openvino_genai", "transformers", LOOKUP)
LENGTHS = {"foredraft": 0, "llama_cpp": 8, "openvino_genai": 5, "transformers": 5, LOOKUP: 10}  # 0: as it likes
BUSY = 0.2  # of the machine's time


def busy_share(seconds: float = 1.0) -> float:
    """The share of all processors' time that somebody uses now."""
    before, after = _ticks(), (time.sleep(seconds), _ticks())[1]
    total, idle = (sum(after) - sum(before)), after[3] - before[3]
    return 1 - idle / max(1, total)


def _ticks() -> list[int]:
    return [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def models(engine: str, chosen: Pair) -> dict[str, str]:
    """Where this engine's target and draft are."""
    if engine == LOOKUP:
        return {"target": str(chosen.target), "draft": "ngram"}
    if engine in ("foredraft", "transformers"):
        return {"target": str(chosen.target), "draft": str(chosen.draft)}
    ending = {"llama_cpp": ".gguf", "openvino_genai": "-openvino"}[engine]
    return {role: str(RUNS / "models" / chosen.name / f"{role}{ending}") for role in ("target", "draft")}


def work(engine: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """One worker's answer. Raises CalledProcessError where it fails."""
    interpreter = python(engine) if engine in ("llama_cpp", "openvino_genai") else Path(sys.executable)
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TRANSFORMERS_VERBOSITY": "error"}
    command = [str(interpreter), str(HERE / f"{'transformers' if engine == LOOKUP else engine}_job.py")]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=True, env=environment, timeout=600
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    flags = parser(__doc__, rounds=3)
    add_flags(flags)
    flags.add_argument("--prompts", type=int, default=len(OPENINGS), help="how many of the openings of demo.py")
    flags.add_argument("--max-new-tokens", type=int, default=128)
    flags.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    args = flags.parse_args()
    chosen = pair(args)
    if (share := busy_share()) > BUSY:
        sys.exit(f"{share:.0%} of the processors' time is taken by something else; measure on an idle machine")
    tokenizer = Tokenizer.from_file(str(chosen.target / "tokenizer.json"))
    prompts = [tokenizer.encode(f"User: {text}\nAssistant:").ids for text in OPENINGS[: args.prompts]]
    last: dict[str, dict[str, Any]] = {}

    def arm(engine: str, drafting: bool) -> float:
        found = models(engine, chosen)
        job = {
            "target": found["target"],
            "draft": found["draft"] if drafting else "",
            "prompts": prompts,
            "max_new_tokens": args.max_new_tokens,
            "num_draft_tokens": LENGTHS[engine],
            "threads": args.threads,
            "context": 1024,
            "dtype": "bf16",
        }
        last[label(engine, drafting)] = answer = work(engine, job)
        results = answer["results"]
        return sum(r["tokens"] for r in results) / sum(r["seconds"] for r in results)

    arms = {label(e, d): (lambda e=e, d=d: arm(e, d)) for e in args.engines for d in (False, True)}
    figures = interleave(arms, args.rounds, warm_up=False)  # each worker warms itself up
    results: dict[str, Any] = {}
    for engine in args.engines:
        plain, drafted = label(engine, False), label(engine, True)
        texts = [[r["output"] for r in last[name]["results"]] for name in (plain, drafted)]
        results[engine] = {
            "version": last[plain]["version"],
            "plain": summary(figures[plain]),
            "drafting": summary(figures[drafted]),
            "speedup": paired_ratio(figures, drafted, plain),
            "texts_that_change": sum(a != b for a, b in zip(*texts, strict=True)),
            "texts": len(prompts),
        }
    report("peers", results, args.out)


def label(engine: str, drafting: bool) -> str:
    return f"{engine}, drafting" if drafting else engine


if __name__ == "__main__":
    main()
