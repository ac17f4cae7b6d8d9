"""The flags of the commands, as dataclasses: declared once, shared by every command that takes them.

Knows their spellings, defaults and help. Values are checked by the library, which says what is wrong with them.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

import typer

from foredraft.cli.console import guard
from foredraft.drafters.registry import DRAFTERS, split, with_profile
from foredraft.errors import RequestError

Options = TypeVar("Options")
MODEL, DRAFTING, SAMPLING, OUTPUT = "Models", "Drafting", "Sampling", "Output"


def flag(*names: str, help: str, panel: str) -> object:
    return typer.Option(*names, help=help, rich_help_panel=panel)


# Flags that several commands take.
ModelFlag = Annotated[
    str | None, flag("--model", help="Target model: a folder or a hub name. Default: the bundled pair.", panel=MODEL)
]
DtypeFlag = Annotated[str, flag("--dtype", help="fp32, bf16, fp16, or auto: as the checkpoint is stored.", panel=MODEL)]
WeightFormatFlag = Annotated[
    str | None, flag("--weight-format", help="Round the target's weights to int4 or int8 on loading.", panel=MODEL)
]
RuntimeFlag = Annotated[
    str, flag("--runtime", help="native (a C library, on CPUs), torch, or auto: the fastest.", panel=MODEL)
]
DeviceFlag = Annotated[str, flag("--device", help="cpu, cuda, cuda:N, or auto.", panel=MODEL)]
DraftDeviceFlag = Annotated[
    str | None, flag("--draft-device", help="The draft model's device. Default: the target's.", panel=MODEL)
]
DraftWeightFormatFlag = Annotated[
    str | None,
    flag(
        "--draft-weight-format",
        help="Bits of the draft model, which change no text: int4, int8, none. Default: what suits its size.",
        panel=MODEL,
    ),
]
RemoteCodeFlag = Annotated[
    bool, flag("--trust-remote-code", help="Run Python code that comes with the model.", panel=MODEL)
]
ChatTemplateFlag = Annotated[
    str | None,
    flag("--chat-template", help="A file with a Jinja chat template, in place of the model's own.", panel=MODEL),
]
GpuFlag = Annotated[str | None, flag("--gpu", help="Index of a GPU; '0' is --device cuda:0.", panel=MODEL)]
TopKFlag = Annotated[int, flag("--top-k", help="Sample from the k likeliest tokens; 0 is off.", panel=SAMPLING)]
TopPFlag = Annotated[float, flag("--top-p", help="Sample from the likeliest share p; 1 is off.", panel=SAMPLING)]
MinPFlag = Annotated[
    float, flag("--min-p", help="Drop tokens below this share of the likeliest; 0 is off.", panel=SAMPLING)
]
JsonFlag = Annotated[bool, flag("--json", help="Print one JSON object and nothing else.", panel=OUTPUT)]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Which models run, how far to draft, how to sample."""

    model: ModelFlag = None
    draft: Annotated[
        str,
        flag(
            "--draft",
            "--draft-model",
            help=f"Who drafts: {', '.join(DRAFTERS)}, auto, or a draft model's folder or hub name; of several, with "
            "commas between them, the best one in each step.",
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
    chat_template: ChatTemplateFlag = None
    trust_remote_code: RemoteCodeFlag = False
    gpu: GpuFlag = None
    num_draft_tokens: Annotated[
        int | None,
        flag(
            "--num-draft-tokens",
            "--gamma",
            help="Draft exactly so many tokens a step; 0 is plain decoding. Default: as the policy decides.",
            panel=DRAFTING,
        ),
    ] = None
    policy: Annotated[
        str | None,
        flag("--policy", help="How far to draft: gain (default), fixed, heuristic, threshold.", panel=DRAFTING),
    ] = None
    verifier: Annotated[
        str,
        flag("--verifier", help="coupled (same seed, same text) or rejection (same distribution).", panel=DRAFTING),
    ] = "coupled"
    temperature: Annotated[float, flag("--temperature", help="0 decodes greedily.", panel=SAMPLING)] = 0.0
    top_k: TopKFlag = 0
    top_p: TopPFlag = 1.0
    min_p: MinPFlag = 0.0
    seed: Annotated[int | None, flag("--seed", help="Same seed, same text. Default: a new one.", panel=SAMPLING)] = None
    max_new_tokens: Annotated[int, flag("--max-new-tokens", help="Longest answer.", panel=SAMPLING)] = 256
    stop: Annotated[
        list[str] | None, flag("--stop", help="End before this text; may be given several times.", panel=SAMPLING)
    ] = None
    ignore_eos: Annotated[
        bool, flag("--ignore-eos", help="Go on after the model's end-of-text token.", panel=SAMPLING)
    ] = False

    json_schema: Annotated[
        Path | None, flag("--json-schema", help="The answer is JSON of the schema in this file.", panel=SAMPLING)
    ] = None
    regex: Annotated[str | None, flag("--regex", help="The answer matches this pattern.", panel=SAMPLING)] = None
    grammar: Annotated[
        Path | None, flag("--grammar", help="The answer is of the Lark grammar in this file.", panel=SAMPLING)
    ] = None

    def check(self) -> None:
        """Raises RequestError where flags contradict each other in a way that the library cannot see."""
        if self.policy not in (None, "fixed") and self.num_draft_tokens is not None:
            raise RequestError(f"--gamma {self.num_draft_tokens} contradicts --policy {self.policy}; give one of them")
        if self.draft == "none" and (self.policy is not None or self.num_draft_tokens):
            given = f"--policy {self.policy}" if self.policy is not None else f"--gamma {self.num_draft_tokens}"
            raise RequestError(f"--draft none contradicts {given}: nothing is drafted; drop one of them")
        names = split(self.draft)
        if self.draft_profile is not None and not {*with_profile()} & {*([names] if isinstance(names, str) else names)}:
            raise RequestError(
                f"--draft-profile contradicts --draft {self.draft}: only {' and '.join(with_profile())} leave anything "
                "out; drop one of them"
            )

    @property
    def target_device(self) -> str:
        """Raises RequestError where --gpu is no index, or contradicts --device."""
        if self.gpu is None:
            return self.device
        if not self.gpu.isdecimal():
            raise RequestError(f"--gpu {self.gpu!r} is not usable; give one index such as 0, or use --device")
        if self.device not in ("auto", f"cuda:{self.gpu}"):
            raise RequestError(f"--gpu {self.gpu} contradicts --device {self.device}; give one of them")
        return f"cuda:{self.gpu}"


@dataclass(frozen=True, slots=True)
class GenerateOptions(RunOptions):
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from; read from stdin where it is missing or '-'.")
    ] = None
    chat: Annotated[
        bool | None,
        flag(
            "--chat/--raw",
            help="Put the prompt through the model's chat template, or not. Default: where it has one.",
            panel=OUTPUT,
        ),
    ] = None
    json: JsonFlag = False
    compare: Annotated[
        bool,
        flag("--compare", help="Run plain and speculative in turn; show equal tokens and the speed-up.", panel=OUTPUT),
    ] = False


@dataclass(frozen=True, slots=True)
class ChatOptions(RunOptions):
    server: Annotated[
        str | None,
        flag("--server", help="Talk to a model of this `foredraft serve`; --model is its uid there.", panel=MODEL),
    ] = None
    api_key: Annotated[
        str | None, flag("--api-key", help="Where the server asks for one. Default: FOREDRAFT_API_KEY.", panel=MODEL)
    ] = None
    system: Annotated[str | None, flag("--system", help="Instructions that open every conversation.", panel=OUTPUT)] = (
        None
    )


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Turn a function of an options dataclass into a command with a flag for each field, errors guarded."""
    hints = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(
            spec.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if spec.default is MISSING else spec.default,
            annotation=hints[spec.name],
        )
        for spec in fields(options)  # type: ignore[arg-type]
    ]

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        def command(**values: object) -> None:
            with guard():
                run(options(**values))

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__annotations__ = {**hints, "return": None}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
