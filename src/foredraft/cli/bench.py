"""`foredraft bench`: what speculation gives on this machine, for one model and one's own prompts."""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from foredraft.cli import session
from foredraft.cli.console import (
    FAILURE,
    INTERRUPTED,
    StdoutError,
    busy,
    interruptible,
    note,
    only_result,
    printing,
    stdout_console,
    write_result,
)
from foredraft.cli.files import check_writable, write_whole
from foredraft.cli.options import (
    DRAFTING,
    MODEL,
    OUTPUT,
    SAMPLING,
    DeviceFlag,
    DraftDeviceFlag,
    DraftWeightFormatFlag,
    DtypeFlag,
    GpuFlag,
    JsonFlag,
    ModelFlag,
    RemoteCodeFlag,
    RunOptions,
    RuntimeFlag,
    TopKFlag,
    TopPFlag,
    WeightFormatFlag,
    flag,
    takes,
)
from foredraft.cli.progress import progress
from foredraft.drafters.registry import DRAFTERS, with_profile
from foredraft.errors import RequestError

if TYPE_CHECKING:
    from foredraft.bench.options import BenchOptions
    from foredraft.bench.result import Bench
    from foredraft.bench.tasks import Task
    from foredraft.drafters.base import Drafter

PROMPTS = "Prompts"


@dataclass(frozen=True, slots=True)
class BenchFlags:
    model: ModelFlag = None
    draft: Annotated[
        str,
        flag(
            "--draft",
            "--draft-model",
            help=f"Who drafts: {', '.join(DRAFTERS)}, auto, or a draft model's folder or hub name.",
            panel=MODEL,
        ),
    ] = "auto"
    dtype: DtypeFlag = "auto"
    weight_format: WeightFormatFlag = None
    runtime: RuntimeFlag = "auto"
    device: DeviceFlag = "auto"
    draft_device: DraftDeviceFlag = None
    draft_weight_format: DraftWeightFormatFlag = None
    draft_profile: Annotated[
        Path | None,
        flag("--draft-profile", help=f"What {' and '.join(with_profile())} leave out: a file.", panel=MODEL),
    ] = None
    trust_remote_code: RemoteCodeFlag = False
    gpu: GpuFlag = None
    gamma: Annotated[
        str,
        flag(
            "--gamma",
            "--num-draft-tokens",
            help="Draft lengths to measure, in a list with ranges; 'policy' lets the policy decide.",
            panel=DRAFTING,
        ),
    ] = "1-10,policy"
    policy: Annotated[
        str | None,
        flag("--policy", help="What 'policy' is: gain (default), fixed, heuristic, threshold.", panel=DRAFTING),
    ] = None
    verifier: Annotated[
        str,
        flag("--verifier", help="coupled (same seed, same text) or rejection (same distribution).", panel=DRAFTING),
    ] = "coupled"
    prompts: Annotated[
        Path | None,
        flag(
            "--prompts",
            help="JSON lines (may be .gz) as Spec-Bench, HumanEval, GSM8K have them. Default: bundled dialogues.",
            panel=PROMPTS,
        ),
    ] = None
    limit: Annotated[
        int | None, flag("--limit", help="At most so many prompts, from all categories.", panel=PROMPTS)
    ] = None
    chat: Annotated[
        bool | None,
        flag(
            "--chat/--raw",
            help="Put prompts through the model's chat template, or not. Default: as the prompt says, else where "
            "there is one.",
            panel=PROMPTS,
        ),
    ] = None
    rounds: Annotated[int, flag("--rounds", help="Times that each prompt runs in each arm.", panel=PROMPTS)] = 3
    samples: Annotated[
        int, flag("--samples", help="Answers to each prompt, with seeds of their own; for pass@k.", panel=PROMPTS)
    ] = 1
    temperature: Annotated[float, flag("--temperature", help="0 decodes greedily.", panel=SAMPLING)] = 0.0
    top_k: TopKFlag = 0
    top_p: TopPFlag = 1.0
    seed: Annotated[int, flag("--seed", help="Of the first prompt; the next has the next.", panel=SAMPLING)] = 0
    max_new_tokens: Annotated[int, flag("--max-new-tokens", help="Longest answer.", panel=SAMPLING)] = 128
    ignore_eos: Annotated[
        bool, flag("--ignore-eos", help="Go on after the model's end-of-text token.", panel=SAMPLING)
    ] = False
    run_code: Annotated[
        bool,
        flag(
            "--run-code",
            help="Run the programs that the model writes, with limits, for pass@k of tasks that have a test.",
            panel=OUTPUT,
        ),
    ] = False
    html: Annotated[Path | None, flag("--html", help="Write a report with plots, one HTML file.", panel=OUTPUT)] = None
    markdown: Annotated[bool, flag("--markdown", help="Print the tables as Markdown.", panel=OUTPUT)] = False
    json: JsonFlag = False

    def as_run_options(self) -> RunOptions:
        """What loads the models and samples, without a draft length."""
        shared = {spec.name for spec in fields(RunOptions)} & {spec.name for spec in fields(BenchFlags)}
        return RunOptions(**{name: getattr(self, name) for name in shared})


@takes(BenchFlags)
def bench(options: BenchFlags) -> None:
    """Measure plain and speculative decoding in turn on the same prompts, by draft length; fails if a token differs."""
    with only_result() as stdout:
        if options.html is not None:
            check_writable(options.html)
        with busy("importing torch and transformers"):
            chosen = bench_options(options)
            tasks = read(options, chosen)
        found = run(options, chosen, tasks)
    try:
        print_result(found, options, stdout)
    finally:
        if options.html is not None:
            write_page(found, options.html)
    finish(found)


def print_result(found: "Bench", options: BenchFlags, stdout: TextIO) -> None:
    """On stderr where stdout takes it not: it took long to find. Raises StdoutError then."""
    from foredraft.bench.table import show

    try:
        if options.json:
            write_result(stdout, json.dumps(found.as_dict()))
        else:
            with printing():
                show(found, stdout_console(highlight=False), markdown=options.markdown)
    except StdoutError:
        note("the figures, which standard output did not take:")
        show(found, stdout_console(stderr=True, highlight=False))
        raise


def bench_options(options: BenchFlags) -> "BenchOptions":
    """Raises RequestError for values out of range, or that contradict each other."""
    from foredraft.bench.options import BenchOptions, read_lengths

    if options.draft == "none":
        raise RequestError("--draft none leaves nothing to compare with plain decoding; choose a drafter")
    if options.json and options.markdown:
        raise RequestError("--json contradicts --markdown: one of them is printed; drop the other")
    own, lengths = options.as_run_options(), read_lengths(options.gamma)
    own.check()
    _ = own.target_device  # raises where --gpu is not usable
    if options.policy is not None and None not in lengths:
        raise RequestError(
            f"--policy {options.policy} is used by no arm of --gamma {options.gamma}; write --gamma "
            f"{options.gamma},policy, or drop it"
        )
    return BenchOptions(
        lengths,
        session.sampling_params(own),
        options.policy,
        options.rounds,
        options.samples,
        options.limit,
        options.chat,
        options.run_code,
    )


def read(options: BenchFlags, chosen: "BenchOptions") -> "tuple[Task, ...]":
    """
    Raises:
        RequestError: the prompts are not usable; the message names the line.
        ForedraftError: what they or the report need is not installed.
    """
    from foredraft.bench.pipeline import check_tasks
    from foredraft.bench.tasks import bundled_tasks, read_tasks

    tasks = bundled_tasks() if options.prompts is None else read_tasks(options.prompts)
    if options.html is not None:
        from foredraft.bench.plots import check_plots

        check_plots()
    return check_tasks(tasks, chosen)


def run(options: BenchFlags, chosen: "BenchOptions", tasks: "tuple[Task, ...]") -> "Bench":
    from foredraft.bench.pipeline import bench as measure

    with busy(f"loading {options.model or 'the bundled pair'}"):
        llm = session.open_llm(options.as_run_options(), repeats=True)
    interruptible()
    name = Path(options.model).name if options.model else "the bundled target"
    with progress() as watcher:
        return measure(llm, tasks, chosen, name=name, drafter=who_drafts(llm.drafter, options), watcher=watcher)


def who_drafts(drafter: "Drafter", options: BenchFlags) -> str:
    """For the report: a draft model by its folder, with the formats of its weights."""
    from foredraft.diagnosis.serving import kernels
    from foredraft.drafters.model import ModelDrafter

    if drafter.name != "model" or not isinstance(drafter, ModelDrafter):
        return drafter.name
    name = "the bundled draft" if options.draft == "auto" else Path(options.draft).name
    return f"{name} ({', '.join(kernels(drafter.model))})"


def write_page(found: "Bench", path: Path) -> None:
    from foredraft.bench.page import page

    write_whole(page(found), path)
    note(f"report: {path}")


def finish(found: "Bench") -> None:
    sys.stdout.flush()
    if found.differences:
        raise typer.Exit(FAILURE)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
