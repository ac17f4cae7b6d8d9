"""A caller that waits for its jobs: until all have ended, or chunk by chunk. It drives where nobody else does."""

from collections import deque
from collections.abc import Iterator

from foredraft.results import Chunk, GenerationResult, Job
from foredraft.runner import Runner
from foredraft.types import StepOutput


def run(runner: Runner, jobs: list[Job]) -> list[GenerationResult]:
    """Drive until these have ended; leave none of them behind when the caller is interrupted."""
    open_requests = {job.request for job in jobs}

    def heard(output: StepOutput) -> None:
        if output.finish_reason:
            open_requests.discard(output.request)

    try:
        for job in jobs:
            runner.submit(job.request, heard)
        runner.run_until(lambda: not open_requests)
    finally:
        for job in jobs:
            runner.cancel(job.request)
    return [job.result() for job in jobs]


def stream(runner: Runner, job: Job) -> Iterator[Chunk]:
    """A chunk for each step; raises the request's error. Begins with the first that is asked for."""
    chunks: deque[Chunk] = deque()  # more than one where other calls drive in the meantime
    runner.submit(job.request, job.sink(chunks.append))
    try:
        while True:
            runner.run_until(lambda: bool(chunks))
            chunk = chunks.popleft()
            if chunk.result and chunk.result.error:
                raise chunk.result.error
            yield chunk
            if chunk.result:
                return
    finally:
        runner.cancel(job.request)
