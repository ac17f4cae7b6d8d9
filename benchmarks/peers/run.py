"""foredraft, llama.cpp, OpenVINO GenAI and transformers on the same models and prompts, plain and drafting, in turn.

    python benchmarks/peers/prepare.py && python benchmarks/peers/run.py
    python benchmarks/peers/prepare.py --shape 344M --quantized
    python benchmarks/peers/run.py --shape 344M --weights int4 --max-new-tokens 64

A worker a time: engines that stay alive beside each other disturb one another. Each run loads, decodes one prompt to
warm up and then all of them, greedy, batch 1; loading is not timed. Reports tokens a second, and how many texts of an
engine change when its drafting is switched on. Refuses to start on a machine that is busy with something else.

A worker reads one job from stdin: {"target", "draft" ("" for none), "prompts" [[token ids]], "max_new_tokens",
"num_draft_tokens", "threads", "context", "dtype", "weights" ("" for dtype's)}, and answers with
{"results": [{"output", "tokens", "seconds"}], "version"}.
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
from prepare import HERE, NODE, QUANTIZED, RUNS, Pair, add_flags, avx512_parts, pair, python
from tokenizers import Tokenizer

LOOKUP = "transformers_lookup"  # transformers again, with prompt lookup instead of the draft model
AVX512 = "llama_cpp_avx512"  # npm's build of llama.cpp
ENGINES = ("foredraft", "llama_cpp", AVX512, "openvino_genai", "transformers", LOOKUP)
QUANTIZING = ("foredraft", "llama_cpp", AVX512)
PEERS = {"llama_cpp": 8, AVX512: 8, "openvino_genai": 5, "transformers": 5, LOOKUP: 10}
LENGTHS = {"foredraft": 0} | PEERS  # of drafts; 0: as it likes
BUSY = 0.2  # of the machine's time


def busy_share(seconds: float = 1.0) -> float:
    """The share of all processors' time that somebody uses now."""
    before, after = _ticks(), (time.sleep(seconds), _ticks())[1]
    total, idle = (sum(after) - sum(before)), after[3] - before[3]
    return 1 - idle / max(1, total)


def _ticks() -> list[int]:
    return [int(part) for part in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def models(engine: str, chosen: Pair, weights: str = "") -> dict[str, str]:
    """Where this engine's target and draft are; `weights` are the target's."""
    if engine == LOOKUP:
        return {"target": str(chosen.target), "draft": "ngram"}
    if engine in ("foredraft", "transformers"):
        return {"target": str(chosen.target), "draft": str(chosen.draft)}
    ending = "-openvino" if engine == "openvino_genai" else ".gguf"
    names = {"target": f"target-{QUANTIZED[weights]}" if weights else "target", "draft": "draft"}
    return {role: str(RUNS / "models" / chosen.name / f"{name}{ending}") for role, name in names.items()}


def command(engine: str) -> list[str]:
    """What starts its worker."""
    if engine == AVX512:
        return [str(RUNS / AVX512 / "job"), str(avx512_parts()[1]), "@".join(NODE)]
    interpreter = python(engine) if engine in ("llama_cpp", "openvino_genai") else Path(sys.executable)
    return [str(interpreter), str(HERE / f"{'transformers' if engine == LOOKUP else engine}_job.py")]


def work(engine: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """One worker's answer. Raises CalledProcessError where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TRANSFORMERS_VERBOSITY": "error"}
    given = json.dumps(job)
    done = subprocess.run(
        command(engine), input=given, capture_output=True, text=True, check=True, env=environment, timeout=600
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    flags = parser(__doc__, rounds=3)
    add_flags(flags)
    flags.add_argument("--prompts", type=int, default=len(OPENINGS), help="how many of the openings of demo.py")
    flags.add_argument("--max-new-tokens", type=int, default=128)
    flags.add_argument("--weights", choices=QUANTIZED, default="", help="of the target; llama.cpp has q8_0 and q4_0")
    flags.add_argument("--engines", nargs="+", choices=ENGINES, help="default: all, or those that have these weights")
    args = flags.parse_args()
    engines = args.engines or (QUANTIZING if args.weights else ENGINES)
    if args.weights and (lacking := set(engines) - set(QUANTIZING)):
        sys.exit(f"--weights {args.weights} is for {', '.join(QUANTIZING)}, not for {', '.join(sorted(lacking))}")
    chosen = pair(args)
    if (share := busy_share()) > BUSY:
        sys.exit(f"{share:.0%} of the processors' time is taken by something else; measure on an idle machine")
    tokenizer = Tokenizer.from_file(str(chosen.target / "tokenizer.json"))
    prompts = [tokenizer.encode(f"User: {text}\nAssistant:").ids for text in OPENINGS[: args.prompts]]
    last: dict[str, dict[str, Any]] = {}

    def arm(engine: str, drafting: bool) -> float:
        found = models(engine, chosen, args.weights)
        job = {
            "target": found["target"],
            "draft": found["draft"] if drafting else "",
            "prompts": prompts,
            "max_new_tokens": args.max_new_tokens,
            "num_draft_tokens": LENGTHS[engine],
            "threads": args.threads,
            "context": 1024,
            "dtype": "bf16",
            "weights": args.weights,
        }
        last[label(engine, drafting)] = answer = work(engine, job)
        results = answer["results"]
        return sum(r["tokens"] for r in results) / sum(r["seconds"] for r in results)

    arms = {label(e, d): (lambda e=e, d=d: arm(e, d)) for e in engines for d in (False, True)}
    figures = interleave(arms, args.rounds, warm_up=False)  # each worker warms itself up
    results: dict[str, Any] = {}
    for engine in engines:
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
