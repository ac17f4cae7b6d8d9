"""`foredraft tune`: which drafter serves a model best, and which of its layers it can draft without."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from foredraft.cli.console import busy, interruptible, note, only_result, printing, stdout_console, write_result
from foredraft.cli.options import (
    DRAFTING,
    OUTPUT,
    SAMPLING,
    DeviceFlag,
    DraftWeightFormatFlag,
    DtypeFlag,
    JsonFlag,
    ModelFlag,
    RemoteCodeFlag,
    flag,
    takes,
)
from foredraft.cli.progress import progress
from foredraft.drafters.registry import drafting

if TYPE_CHECKING:
    from foredraft import LLM
    from foredraft.models.load import LoadOptions
    from foredraft.tuning.options import TuneOptions, Watcher
    from foredraft.tuning.ranking import Advice

TEXT, SEARCH = "Text", "Search"


@dataclass(frozen=True, slots=True)
class TuneFlags:
    model: ModelFlag = None
    draft: Annotated[
        list[str] | None,
        flag(
            "--draft",
            "--draft-model",
            help="A draft model to compare as well; may be given several times.",
            panel=DRAFTING,
        ),
    ] = None
    without: Annotated[
        list[str] | None,
        flag(
            "--without",
            help=f"Leave a drafter out: {', '.join(drafting())}; may be given several times.",
            panel=DRAFTING,
        ),
    ] = None
    dtype: DtypeFlag = "auto"
    device: DeviceFlag = "auto"
    draft_weight_format: DraftWeightFormatFlag = None
    trust_remote_code: RemoteCodeFlag = False
    calibration: Annotated[
        Path | None,
        flag(
            "--calibration",
            help="Prompts: a .jsonl or .txt file (may be .gz), or a folder of them. Default: the model's own.",
            panel=TEXT,
        ),
    ] = None
    prompts: Annotated[
        int, flag("--prompts", help="Held-out prompts to confirm with; twice as many calibrate.", panel=TEXT)
    ] = 16
    tokens: Annotated[int, flag("--tokens", help="Tokens to generate after each prompt.", panel=TEXT)] = 128
    temperature: Annotated[float, flag("--temperature", help="0 decodes greedily.", panel=SAMPLING)] = 0.0
    trials: Annotated[
        int, flag("--trials", help="Sets that each search tries, earlier runs of a study included.", panel=SEARCH)
    ] = 400
    max_seconds: Annotated[float, flag("--max-seconds", help="Time for searching.", panel=SEARCH)] = 240.0
    seed: Annotated[int, flag("--seed", help="Of prompts, sampling and search.", panel=SEARCH)] = 0
    study: Annotated[
        Path | None, flag("--study", help="An SQLite file to keep trials in, and to go on from.", panel=SEARCH)
    ] = None
    rounds: Annotated[int, flag("--rounds", help="Times that the confirmation runs each prompt.", panel=SEARCH)] = 3
    out: Annotated[
        Path | None,
        flag("--out", help="Where to write the skip profile. Default: where --draft skip finds it.", panel=OUTPUT),
    ] = None
    save_anyway: Annotated[
        bool,
        flag(
            "--save-anyway",
            help="Write the profile also where its prediction and its measurement are more than a quarter apart.",
            panel=OUTPUT,
        ),
    ] = False
    plot: Annotated[Path | None, flag("--plot", help="Write a picture (.png, .svg, .pdf).", panel=OUTPUT)] = None
    json: JsonFlag = False


@takes(TuneFlags)
def tune(options: TuneFlags) -> None:
    """Find the best drafter for a model: score, search layers to skip, confirm; Ctrl-C keeps what was found."""
    with only_result() as stdout:
        with busy("importing torch and transformers"):
            chosen = tune_options(options)
        llm, load = open_target(options)
        with progress() as watcher:
            advice = advise(llm, chosen, options, load, watcher)
        written = write_profile(advice, options.out, anyway=options.save_anyway)
        if options.plot is not None:
            from foredraft.tuning.report import plot

            plot(advice, options.plot)
    if options.json:
        write_result(stdout, json.dumps(advice.as_dict() | {"profile": written and str(written)}))
        return
    from foredraft.tuning.report import show

    with printing():
        show(advice, stdout_console(highlight=False))
    note(f"profile: {written}" if written else why_none(advice))


def tune_options(options: TuneFlags) -> "TuneOptions":
    """Raises RequestError for values out of range."""
    from foredraft.tuning.options import TuneOptions
    from foredraft.types import SamplingParams

    SamplingParams(temperature=options.temperature)
    return TuneOptions(
        drafts=tuple(options.draft or ()),
        draft_weight_format=options.draft_weight_format,
        without=tuple(options.without or ()),
        calibration=options.calibration,
        prompts=options.prompts,
        tokens=options.tokens,
        temperature=options.temperature,
        trials=options.trials,
        max_seconds=options.max_seconds,
        seed=options.seed,
        study=options.study,
        rounds=options.rounds,
    )


def open_target(options: TuneFlags) -> "tuple[LLM, LoadOptions]":
    from foredraft import LLM
    from foredraft.models.load import LoadOptions

    remote = options.trust_remote_code
    with busy(f"loading {options.model or 'the bundled target'}"):
        llm = LLM(
            options.model,
            "none",
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=remote,
            prefix_cache=False,  # the same prompts come again and again
        )
    interruptible()
    return llm, LoadOptions(options.dtype, options.device, None, remote)


def advise(llm: "LLM", chosen: "TuneOptions", options: TuneFlags, load: "LoadOptions", watcher: "Watcher") -> "Advice":
    from foredraft.tuning.pipeline import advise as run

    return run(llm, chosen, name=options.model or "the bundled target", load=load, watcher=watcher)


def write_profile(advice: "Advice", out: Path | None, *, anyway: bool) -> Path | None:
    """Where the profile went: where it was asked for, else where drafters find it.

    None where nothing was written: there is none, it is doubtful, or it does not pay and nobody asked for a file.
    """
    from foredraft import profile
    from foredraft.tuning.ranking import WORTH

    if advice.profile is None or (advice.doubt is not None and not anyway):
        return None
    if out is None and max(figures.speedup for figures in advice.profile.measured.values()) < WORTH:
        return None
    return profile.save(advice.profile, out)


def why_none(advice: "Advice") -> str:
    if advice.profile is None or advice.doubt is None:
        return "no skip profile was written"
    return f"no skip profile was written: {advice.doubt}; tune again on an idle machine, or give --save-anyway"
