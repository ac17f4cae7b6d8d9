"""`foredraft audit`: evidence that drafting changes nothing, for one's own model, on this machine."""

import json
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foredraft.cli import session
from foredraft.cli.console import (
    FAILURE,
    INTERRUPTED,
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
    DraftWeightFormatFlag,
    DtypeFlag,
    GpuFlag,
    JsonFlag,
    MinPFlag,
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
from foredraft.cli.processors import load_processors, read_biases
from foredraft.cli.progress import progress
from foredraft.drafters.registry import DRAFTERS
from foredraft.errors import RequestError

if TYPE_CHECKING:
    from foredraft import LLM, SamplingParams
    from foredraft.audit.exact import Difference
    from foredraft.audit.options import AuditOptions
    from foredraft.audit.result import Audit
    from foredraft.audit.subjects import Audited


@dataclass(frozen=True, slots=True)
class AuditFlags:
    model: ModelFlag = None
    draft: Annotated[
        list[str] | None,
        flag(
            "--draft",
            "--draft-model",
            help=f"Whom to audit: {', '.join(name for name in DRAFTERS if name != 'none')}, auto, or a draft model's "
            "folder or hub name; of several, with commas between them, the best one in each step; may be given several "
            "times. Default: all that need no preparation, and auto.",
            panel=MODEL,
        ),
    ] = None
    dtype: DtypeFlag = "auto"
    weight_format: WeightFormatFlag = None
    runtime: RuntimeFlag = "auto"
    device: DeviceFlag = "auto"
    draft_weight_format: DraftWeightFormatFlag = None
    trust_remote_code: RemoteCodeFlag = False
    gpu: GpuFlag = None
    quick: Annotated[
        bool, flag("--quick", help="Fewer prompts, lengths and samples: about a minute.", panel=DRAFTING)
    ] = False
    case: Annotated[
        str | None,
        flag("--case", help="Replay one case that an audit printed, and nothing else.", panel=DRAFTING),
    ] = None
    seed: Annotated[int, flag("--seed", help="Same seed, same audit.", panel=SAMPLING)] = 0
    temperature: Annotated[
        float | None,
        flag(
            "--temperature", help="With the flags below: audit these settings too; 0 decodes greedily.", panel=SAMPLING
        ),
    ] = None
    top_k: TopKFlag = 0
    top_p: TopPFlag = 1.0
    min_p: MinPFlag = 0.0
    stop: Annotated[
        list[str] | None, flag("--stop", help="End before this text; may be given several times.", panel=SAMPLING)
    ] = None
    logit_bias: Annotated[
        list[str] | None,
        flag("--logit-bias", help="ID=VALUE, added to a token's score; may be given several times.", panel=SAMPLING),
    ] = None
    processor: Annotated[
        list[str] | None,
        flag(
            "--processor",
            help="FILE.py:NAME or MODULE:NAME of a logits processor, its class, or a Stateful; its code is run. May be "
            "given several times.",
            panel=SAMPLING,
        ),
    ] = None
    json_schema: Annotated[
        Path | None, flag("--json-schema", help="Audit JSON of the schema in this file too.", panel=SAMPLING)
    ] = None
    regex: Annotated[str | None, flag("--regex", help="Audit output of this pattern too.", panel=SAMPLING)] = None
    grammar: Annotated[
        Path | None, flag("--grammar", help="Audit output of the Lark grammar in this file too.", panel=SAMPLING)
    ] = None
    json: JsonFlag = False
    output: Annotated[Path | None, flag("--output", help="Write that JSON object to a file.", panel=OUTPUT)] = None

    def as_run_options(self) -> RunOptions:
        """What loads the target, without a drafter: each is lent to it in turn."""
        shared = {spec.name for spec in fields(RunOptions)} & {spec.name for spec in fields(AuditFlags)}
        values = {name: getattr(self, name) for name in shared - {"draft", "draft_weight_format", "temperature"}}
        return RunOptions(**values, draft="none", temperature=self.temperature or 0.0)

    @property
    def names_settings(self) -> bool:
        given = (self.json_schema, self.regex, self.grammar, self.temperature)
        filters = (self.top_k, self.top_p, self.min_p) != (0, 1.0, 0.0)
        return filters or any((self.stop, self.logit_bias, self.processor)) or any(it is not None for it in given)


@takes(AuditFlags)
def audit(options: AuditFlags) -> None:
    """Prove on this machine that drafting changes no token; planted bugs show that the proof would notice."""
    with only_result() as stdout:
        if options.output is not None:
            check_writable(options.output)
        with busy("importing torch and transformers"):
            chosen = audit_options(options)
        with busy(f"loading {options.model or 'the bundled pair'}"):
            llm = session.open_llm(options.as_run_options())
            audited, left_out = drafters(options, llm)
        interruptible()
        if options.case is not None:
            replay(options, llm, audited)
            return
        found = run(options, chosen, llm, audited, left_out)
    text = json.dumps(found.as_dict())
    if options.output is not None:
        write_whole(text + "\n", options.output)
        note(f"certificate: {options.output}")
    if options.json:
        write_result(stdout, text)
    else:
        from foredraft.audit.table import show

        with printing():
            show(found, stdout_console(highlight=False), command(options))
    finish(found)


def audit_options(options: AuditFlags) -> "AuditOptions":
    """Raises RequestError for values out of range, or that contradict each other."""
    from foredraft.assembly import bundled_draft
    from foredraft.audit.options import AuditOptions
    from foredraft.audit.subjects import check_bits

    own = options.as_run_options()
    own.check()
    _ = own.target_device  # raises where --gpu is not usable
    check_bits(options.draft or [], options.draft_weight_format, bundled_draft(options.model))
    mine = (own_settings(options),) if options.names_settings else ()
    if options.quick:
        return AuditOptions.quick(options.seed, mine)
    return AuditOptions(seed=options.seed, own=mine)


def own_settings(options: AuditFlags) -> "SamplingParams":
    """Raises RequestError for values out of range, or that contradict each other."""
    return replace(
        session.checked_params(options.as_run_options()),
        logit_bias=read_biases(options.logit_bias or ()),
        processors=load_processors(options.processor or ()),
    )


def drafters(options: AuditFlags, llm: "LLM") -> "tuple[list[Audited], dict[str, str]]":
    from foredraft.assembly import bundled_draft
    from foredraft.audit.subjects import find
    from foredraft.models.load import LoadOptions

    own = options.as_run_options()
    load = LoadOptions(options.dtype, own.target_device, None, options.trust_remote_code, options.runtime)
    draft = bundled_draft(options.model)
    return find(llm, options.draft or [], load, bundled=draft is not None, weight_format=options.draft_weight_format)


def run(
    options: AuditFlags, chosen: "AuditOptions", llm: "LLM", audited: "list[Audited]", left_out: dict[str, str]
) -> "Audit":
    from foredraft.audit.pipeline import audit as prove

    name = Path(options.model).name if options.model else "the bundled target"
    with progress() as watcher:
        return prove(llm, audited, chosen, name=name, left_out=left_out, watcher=watcher)


def replay(options: AuditFlags, llm: "LLM", audited: "list[Audited]") -> None:
    """One case again; leaves with an error code where it still fails, and never says that anything passed."""
    from foredraft.audit import casefile, shrink
    from foredraft.audit.play import Subject

    if len(audited) != 1:
        raise RequestError("--case needs the one --draft that it was found with; copy the whole line")
    assert options.case is not None
    case = casefile.loads(options.case, load_processors(options.processor or ()))
    found = shrink.replay(llm, Subject(audited[0].drafter), case)
    if found is None:
        note("no difference in this case; run the audit without --case for all of them")
        return
    note(_told(found))
    raise typer.Exit(FAILURE)


def _told(found: "Difference") -> str:
    where = f"{found.what} at output position {found.position}"
    return f"different: {where}: plain decoding has {found.expected}, drafting {found.got}"


def command(options: AuditFlags) -> str:
    """What was typed, as far as it decides what is loaded."""
    names = ("model", "dtype", "weight_format", "runtime", "device", "draft_weight_format", "gpu")
    default = AuditFlags()
    given = [
        f"--{name.replace('_', '-')} {shlex.quote(str(getattr(options, name)))}"
        for name in names
        if getattr(options, name) != getattr(default, name)
    ]
    given += [f"--processor {shlex.quote(it)}" for it in options.processor or ()]
    return " ".join(["foredraft audit", *given, *(["--trust-remote-code"] if options.trust_remote_code else [])])


def finish(found: "Audit") -> None:
    sys.stdout.flush()
    if found.status == "interrupted":
        raise typer.Exit(INTERRUPTED)
    if found.status != "passed":
        raise typer.Exit(FAILURE)
