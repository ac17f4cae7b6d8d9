"""transformers' generate, plain or assisted: one job from stdin, its outputs and seconds to stdout. See run.py."""

import json
import sys
from time import perf_counter

import torch
import transformers
from transformers import AutoModelForCausalLM


def load(folder: str, dtype: str) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    dtype = {"bf16": "bfloat16", "f32": "float32"}[job["dtype"]]
    target = load(job["target"], dtype)
    count = job["max_new_tokens"]
    lookup = {"prompt_lookup_num_tokens": job["num_draft_tokens"]} if job["draft"] == "ngram" else {}
    drafting = lookup or ({"assistant_model": load(job["draft"], dtype)} if job["draft"] else {})

    def run(ids: list[int]) -> dict:
        batch = torch.tensor([ids])
        mask = torch.ones_like(batch)
        limits = {"max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, "do_sample": False}
        began = perf_counter()
        output = target.generate(input_ids=batch, attention_mask=mask, **limits, **drafting)[0, len(ids) :].tolist()
        return {"output": output, "tokens": len(output), "seconds": perf_counter() - began}

    run(job["prompts"][0])
    results = [run(ids) for ids in job["prompts"]]
    print(json.dumps({"results": results, "version": transformers.__version__}), flush=True)


if __name__ == "__main__":
    main()
