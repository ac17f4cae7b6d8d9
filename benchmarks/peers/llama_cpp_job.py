"""llama.cpp through PyPI's xllamacpp: one job from stdin, its outputs and seconds to stdout. See run.py."""

import json
import os
import sys
from time import perf_counter

import xllamacpp

DRAFT = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE


def server(job: dict) -> "xllamacpp.Server":
    params = xllamacpp.CommonParams()
    params.model.path = job["target"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.cache_prompt = False
    params.verbosity = -1
    if job["draft"]:
        params.speculative.types = [DRAFT]
        params.speculative.draft.mparams.path = job["draft"]
        params.speculative.draft.n_max = job["num_draft_tokens"]
        params.speculative.draft.cpuparams.n_threads = job["threads"]
        params.speculative.draft.cpuparams_batch.n_threads = job["threads"]
    return xllamacpp.Server(params)


def main() -> None:
    job = json.load(sys.stdin)
    out = os.dup(1)
    os.dup2(2, 1)  # what llama.cpp prints is not ours
    engine = server(job)

    def run(ids: list[int]) -> dict:
        request = {
            "prompt": ids,
            "n_predict": job["max_new_tokens"],
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        began = perf_counter()
        answer = engine.handle_completions(request)
        timings = answer["timings"]
        return {
            "output": answer["choices"][0]["text"],
            "tokens": answer["usage"]["completion_tokens"],
            "seconds": perf_counter() - began,
            "decode_per_second": timings["predicted_per_second"],
            "drafted": timings.get("draft_n", 0),
            "accepted": timings.get("draft_n_accepted", 0),
        }

    run(job["prompts"][0])
    results = [run(ids) for ids in job["prompts"]]
    os.write(out, json.dumps({"results": results, "version": xllamacpp.__version__}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
