"""OpenVINO GenAI: one job from stdin, its outputs and seconds to stdout. See run.py for the form."""

import json
import os
import sys
from time import perf_counter

import numpy as np
import openvino as ov
import openvino_genai as genai


def pipeline(job: dict) -> genai.LLMPipeline:
    hints = {"INFERENCE_PRECISION_HINT": job["dtype"], "INFERENCE_NUM_THREADS": job["threads"]}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1  # GiB
    scheduler.enable_prefix_caching = False
    draft = {"draft_model": genai.draft_model(job["draft"], "CPU", **hints)} if job["draft"] else {}
    return genai.LLMPipeline(job["target"], "CPU", scheduler_config=scheduler, **draft, **hints)


def main() -> None:
    job = json.load(sys.stdin)
    engine = pipeline(job)
    config = genai.GenerationConfig()
    config.max_new_tokens = job["max_new_tokens"]
    config.ignore_eos = True
    config.do_sample = False
    if job["draft"]:
        config.num_assistant_tokens = job["num_draft_tokens"]

    def run(ids: list[int]) -> dict:
        batch = np.array([ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(batch), ov.Tensor(np.ones_like(batch)))
        began = perf_counter()
        answer = engine.generate(inputs, config)
        return {"output": list(answer.tokens[0]), "tokens": len(answer.tokens[0]), "seconds": perf_counter() - began}

    run(job["prompts"][0])
    results = [run(ids) for ids in job["prompts"]]
    print(json.dumps({"results": results, "version": ov.get_version()}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
