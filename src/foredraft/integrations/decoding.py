"""Runs one call of transformers' generate() after transformers has prepared it: rows of token ids in and out."""

from collections.abc import Iterator

import torch

from foredraft.integrations.output import Benchmarks, Columns, Meter
from foredraft.integrations.rows import Call, row_request
from foredraft.runner import Runner
from foredraft.types import Request, StepOutput


def decode(runner: Runner, call: Call) -> tuple[torch.Tensor, Benchmarks]:
    """Run the rows to their end. Ids [B, L + new] as transformers returns them.

    Raises:
        RequestError: a row is padded on the right, has no token, or does not fit the model's context.
    """
    ends: dict[int, int] = {}
    rows = [row_request(runner.engine, call, i, ends) for i in range(len(call.input_ids))]
    columns = Columns(rows, call)
    meter = Meter()
    for outputs in _steps(runner, rows):
        meter.count(outputs)
        columns.flush()
    count = max(row.num_output for row in rows) if call.ends_rows else max(ends.values())
    columns.flush(count)
    meter.benchmarks.n_token_generated = sum(min(count, row.num_output) for row in rows)
    return torch.cat((call.input_ids, columns.tensor(count)), dim=1), meter.benchmarks


def _steps(runner: Runner, rows: list[Request]) -> Iterator[list[StepOutput]]:
    """What each step gave the rows, until they have ended; after an error, or if the caller leaves, cancel the rest.

    Raises what a row's own processor or criterion raised.
    """
    outputs: list[StepOutput] = []
    try:
        for row in rows:
            runner.submit(row, outputs.append)
        while any(row.finish_reason is None for row in rows):
            runner.run_until(lambda: bool(outputs))
            new = outputs[:]
            outputs.clear()
            error = next((output.request.error for output in new if output.request.error), None)
            if error is not None:
                raise error
            yield new
    finally:
        for row in rows:
            runner.cancel(row)
