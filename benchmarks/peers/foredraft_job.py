"""foredraft: one job from stdin, its outputs and seconds to stdout. See run.py for the form."""

import json
import sys
from time import perf_counter

import torch

import foredraft
from foredraft import LLM, SamplingParams


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    dtype = {"bf16": "bfloat16", "f32": "float32"}[job["dtype"]]
    draft, weights = job["draft"] or "none", job["weights"] or None
    llm = LLM(job["target"], draft=draft, dtype=dtype, weight_format=weights, prefix_cache=False)
    params = SamplingParams(max_new_tokens=job["max_new_tokens"], ignore_eos=True)

    def run(ids: list[int]) -> dict:
        began = perf_counter()
        result = llm.generate(ids, params)
        return {"output": result.token_ids, "tokens": len(result.token_ids), "seconds": perf_counter() - began}

    run(job["prompts"][0])
    results = [run(ids) for ids in job["prompts"]]
    print(json.dumps({"results": results, "version": foredraft.__version__}), flush=True)


if __name__ == "__main__":
    main()
