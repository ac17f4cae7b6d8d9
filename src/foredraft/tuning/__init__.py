"""Which drafter serves a model best, and which of its layers it can draft without: scored, searched, confirmed.

A file each, a line builds on those above it:

    driving      another drafter in a loaded LLM for a while
    machine      whether something else keeps the processors busy
    acceptance   which drafts would have been kept on a text, and how many decoding steps that makes
    calibration  the text to score on, and the prompts held out from it
    costs        what steps, drafts and sub-layers cost here
    fitting      from timed steps to costs, and how sure they are
    carousel     timing steps in the engine, with drafters taking turns
    forecast     acceptance and costs as speed-up, over draft lengths
    score        a drafter's acceptance by one teacher-forced pass over the calibration text
    search       sets of sub-layers to skip, by Bayesian search and local steps (extra `tune`)
    confirm      the best few by real generation, interleaved with plain decoding
    options      what is asked of a run
    candidates   who could draft for a model, and what has to be timed to price them
    skipping     the searches on one model and one text
    ranking      what came of a run: rows, the recommendation, doubts, the profile
    pipeline     a run from beginning to end
    report       the table and the plots
"""
