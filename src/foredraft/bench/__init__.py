"""What speculation gives on one machine, for one model and these prompts: measured, checked, shown.

A file each, a line builds on those above it:

    tasks       prompts from JSON lines, with categories, turns and references
    options     what is asked of a run
    asking      one request in one arm: its tokens, its seconds, when each token came
    measure     all requests in all arms, taken in turn, and where their tokens differ
    figures     from runs to speed-ups with intervals, acceptance and times; arithmetic only
    prediction  acceptance and costs of the same drafter, as `foredraft tune` finds them, as a speed-up to compare with
    sandbox     a program in a process of its own, with limits (`guard` is what runs there)
    programs    from an answer to a program and its test
    quality     ROUGE-2 of summaries, pass@k of programs
    result      all of it, ready for JSON
    pipeline    a run from beginning to end
    table       the result as tables
    plots       the result as pictures (extra `bench`)
    page        the result as one HTML page that asks the network for nothing
"""
