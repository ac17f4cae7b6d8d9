"""Is the search for sub-layers to skip better than luck? Its best set against random sets of the same size.

    python benchmarks/skip_search.py --trials 400 --random 200

Costs are measured once and serve both, so that only the sets differ. Both are scored once more, exactly, on twice the
text that the search saw.
"""

import random
from pathlib import Path
from time import perf_counter

import _timing
import torch

from foredraft import LLM, SamplingParams
from foredraft.models.base import SkipSet
from foredraft.tuning.calibration import continue_prompts, pick_prompts
from foredraft.tuning.candidates import OWN, family, wide_passes
from foredraft.tuning.carousel import measure
from foredraft.tuning.forecast import forecast
from foredraft.tuning.score import Scorer
from foredraft.tuning.search import Evaluation, Limits, Search, Study, skip_set
from foredraft.tuning.skipping import draft_cost


def main() -> None:
    arguments = _timing.parser(__doc__, rounds=1)
    arguments.add_argument("--model", help="folder or hub name; default: the bundled target")
    arguments.add_argument("--dtype", default="auto")
    arguments.add_argument("--calibration", type=Path)
    arguments.add_argument("--trials", type=int, default=400)
    arguments.add_argument("--max-seconds", type=float, default=600)
    arguments.add_argument("--random", type=int, default=200)
    arguments.add_argument("--tokens", type=int, default=128)
    arguments.add_argument("--prompts", type=int, default=16)
    arguments.add_argument("--seed", type=int, default=0)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM(args.model, "none", dtype=args.dtype, prefix_cache=False)
    prompts = pick_prompts(llm, args.calibration, 2 * args.prompts, 0, seed=args.seed)
    calibration = continue_prompts(llm, prompts.calibration, SamplingParams(max_new_tokens=args.tokens))
    costs = measure(llm, calibration, [*family(OWN, llm.model), *wide_passes()], laps=12, max_seconds=60)

    def evaluator(scorer: Scorer, **how: int | bool):  # type: ignore[no-untyped-def]
        def evaluate(skip: SkipSet) -> Evaluation:
            acceptance = scorer.score(llm.model.variant(skip=skip), **how)
            cost = draft_cost(costs, OWN, llm.model, skip)
            return Evaluation(acceptance.alpha, forecast(acceptance, cost, costs.steps, args.tokens))

        return evaluate

    scorer = Scorer(llm.model, calibration.every(2))
    evaluate = evaluator(scorer)
    began = perf_counter()
    search = Search(Study(llm.model.num_layers), evaluate, Limits(args.trials, args.max_seconds, args.seed))
    found = search.run()
    seconds = perf_counter() - began
    best, layers = found[0].skip, llm.model.num_layers
    source = random.Random(args.seed)
    drawn = [source.sample(range(2 * layers), len(best)) for _ in range(args.random)]
    sets = [skip_set(tuple(i in chosen for i in range(2 * layers))) for chosen in drawn]
    lucky = max(sets, key=lambda skip: evaluate(skip).forecast.speedup)
    scorer.close()
    scorer = Scorer(llm.model, calibration)
    exact = evaluator(scorer, exact=True)
    results = {}
    for name, skip in (("search", best), ("random", lucky)):
        it = exact(skip)
        sublayers = {"attention": skip.attention, "mlp": skip.mlp}
        results[name] = {
            "skip": sublayers,
            "speedup": it.forecast.speedup,
            "alpha": it.alpha,
            "length": it.forecast.gamma,
        }
    scorer.close()
    results |= {"size": len(best), "sub-layers": 2 * layers, "trials": len(found), "search seconds": seconds}
    _timing.report("skip_search", results, args.out)


if __name__ == "__main__":
    main()
