"""Which drafter serves a model best, and which of its layers it can draft without: scored, searched, confirmed.

One noun a file, each builds on those above it:

    driving      another drafter in a loaded LLM for a while
    acceptance   which drafts would have been kept on a text, and how many decoding steps that makes
    calibration  the text to score on, and the prompts held out from it
    costs        what steps, drafts and sub-layers cost here, measured in the engine itself
    forecast     acceptance and costs as speed-up, over draft lengths
    score        a drafter's acceptance by one teacher-forced pass over the calibration text
    search       sets of sub-layers to skip, by Bayesian search and local steps (extra `tune`)
    confirm      the best few by real generation, interleaved with plain decoding
    advice       what was asked, and what came of it: rows, the recommendation, the profile
    advise       everything for one model, in order
    report       the table and the plots
"""
