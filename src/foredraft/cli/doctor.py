"""`foredraft doctor`: what a bug report needs, and whether all is well here."""

import json
from dataclasses import dataclass
from typing import Annotated

import typer

from foredraft.cli.console import FAILURE, busy, interruptible, only_result, printing, stdout_console, write_result
from foredraft.cli.options import (
    MODEL,
    DeviceFlag,
    DraftWeightFormatFlag,
    DtypeFlag,
    JsonFlag,
    ModelFlag,
    RemoteCodeFlag,
    RuntimeFlag,
    WeightFormatFlag,
    flag,
    takes,
)


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    model: ModelFlag = None
    draft: Annotated[
        str,
        flag("--draft", "--draft-model", help="Who drafts, as for generate.", panel=MODEL),
    ] = "auto"
    dtype: DtypeFlag = "auto"
    weight_format: WeightFormatFlag = None
    runtime: RuntimeFlag = "auto"
    device: DeviceFlag = "auto"
    draft_weight_format: DraftWeightFormatFlag = None
    trust_remote_code: RemoteCodeFlag = False
    json: JsonFlag = False


@takes(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Say what is installed, what serves a model on this machine, and which promises hold; for bug reports, too."""
    with only_result() as stdout:
        from foredraft.diagnosis.diagnose import diagnose

        interruptible()
        with busy(f"examining {options.model or 'the bundled pair'}"):
            diagnosis = diagnose(
                options.model,
                options.draft,
                dtype=options.dtype,
                weight_format=options.weight_format,
                runtime=options.runtime,
                device=options.device,
                draft_weight_format=options.draft_weight_format,
                trust_remote_code=options.trust_remote_code,
            )
    if options.json:
        write_result(stdout, json.dumps(diagnosis.as_dict()))
    else:
        from foredraft.diagnosis.report import show

        with printing():
            show(diagnosis, stdout_console(highlight=False))
    if not diagnosis.well:
        raise typer.Exit(FAILURE)
