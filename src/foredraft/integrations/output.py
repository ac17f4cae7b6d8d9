"""What a call of generate() gives back: the rows column by column, streamed and padded, and IPEX-LLM's figures."""

from dataclasses import dataclass, field
from time import perf_counter

import torch

from foredraft.errors import RequestError
from foredraft.integrations.rows import Call
from foredraft.types import Request, StepOutput


@dataclass(slots=True)
class Benchmarks:
    """IPEX-LLM's figures of one call. A round is a pass of the target after the first token, over all rows."""

    first_token_time: float = 0.0  # seconds until every row that runs at once has its first token
    generate_time: list[float] = field(default_factory=list)  # seconds, one for each round, as the next two
    draft_time: list[float] = field(default_factory=list)
    verify_time: list[float] = field(default_factory=list)
    draft_num: list[int] = field(default_factory=list)  # tokens drafted in each round
    accept_num: list[int] = field(default_factory=list)  # tokens each round added: the accepted and the target's own
    n_drafted: int = 0
    n_matched: int = 0  # of these, accepted
    n_token_generated: int = 0
    e2e_time_without_first: float = 0.0


class Columns:
    """The output column by column: a tensor [B] for each position that all rows have reached."""

    def __init__(self, rows: list[Request], call: Call) -> None:
        self.rows = rows
        self.call = call
        self.columns: list[torch.Tensor] = []

    def flush(self, count: int | None = None) -> None:
        """Make the columns that are complete and stream them; with `count`, all up to there, then end the stream."""
        open_rows = [row.num_output for row in self.rows if row.finish_reason is None]
        ready = min(open_rows, default=0) if count is None else count
        for position in range(len(self.columns), ready):
            self.columns.append(torch.tensor([self._token(row, position) for row in self.rows]))
            if self.call.streamer is not None:
                self.call.streamer.put(self.columns[-1])
        if count is not None and self.call.streamer is not None:
            self.call.streamer.end()

    def _token(self, row: Request, position: int) -> int:
        if position < row.num_output:
            return row.token_ids[row.prompt_len + position]
        if self.call.pad_token_id is None:
            raise RequestError("pad_token_id=None: rows of different lengths need one to be padded with; set it")
        return self.call.pad_token_id

    def tensor(self, count: int) -> torch.Tensor:
        """Ids [B, count]."""
        return torch.stack(self.columns[:count], dim=1).to(self.call.input_ids)


class Meter:
    """Measures rounds by what each adds to the rows' statistics."""

    def __init__(self) -> None:
        self.benchmarks = Benchmarks()
        self.began = self.last = perf_counter()
        self.before: dict[Request, tuple[float, float, int, int]] = {}

    def count(self, outputs: list[StepOutput]) -> None:
        now, b = perf_counter(), self.benchmarks
        moved = [self._moved(output.request) for output in outputs]
        if not b.first_token_time:
            b.first_token_time = now - self.began
        else:
            drafting, verifying, drafted, accepted = (sum(column) for column in zip(*moved, strict=True))
            b.generate_time.append(now - self.last)
            b.draft_time.append(drafting)
            b.verify_time.append(verifying)
            b.draft_num.append(int(drafted))
            b.accept_num.append(sum(len(output.token_ids) for output in outputs))
            b.n_drafted += int(drafted)
            b.n_matched += int(accepted)
            b.e2e_time_without_first += now - self.last
        self.last = now

    def _moved(self, row: Request) -> tuple[float, float, int, int]:
        old = self.before.get(row, (0.0, 0.0, 0, 0))
        s = row.stats
        new = self.before[row] = (s.seconds_drafting, s.seconds_verifying, s.drafted, s.accepted)
        return new[0] - old[0], new[1] - old[1], new[2] - old[2], new[3] - old[3]
