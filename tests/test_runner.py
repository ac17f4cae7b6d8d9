"""The one driver of the engine: many threads, streams side by side, and failures that stay with those they belong to.

FOREDRAFT_STORM_SECONDS=60 makes the storm at the end a minute long.
"""

import gc
import os
import subprocess
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch
from children import in_a_child
from fakes import Ask, RandomDrafter, TableModel, new_request
from models import draws, tiny
from transformers import LogitsProcessor

from foredraft import LLM, SamplingParams, Structured, accelerate
from foredraft.drafters.several import drafters_of
from foredraft.engine import Engine
from foredraft.errors import ExactnessError, ExactnessWarning, GenerationError, RequestError, StoppedError
from foredraft.models.invariance import FIXED
from foredraft.models.load import load_target
from foredraft.native import library
from foredraft.policy import Fixed
from foredraft.runner import Runner
from foredraft.types import StepOutput

ROOT = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(max_new_tokens=12)
STORM_SECONDS = float(os.environ.get("FOREDRAFT_STORM_SECONDS", "6"))


class Gate(LogitsProcessor):
    """Holds a step up until it is opened; tells when a step has come."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, input_ids, scores):
        self.reached.set()
        assert self.open.wait(30)
        return scores


class Fails(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 8:
            raise KeyError("eight")
        return scores


def runner(batch: int = 2) -> Runner:
    model = TableModel()
    drafter = RandomDrafter(model.vocab_size)
    return Runner(Engine(model, drafter, Fixed(2), max_batch_size=batch, max_model_len=256))


class Heard:
    """A sink that keeps what it was told."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []
        self.ended = threading.Event()

    def __call__(self, output: StepOutput) -> None:
        self.outputs.append(output)
        if output.finish_reason:
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]


def submit(made: Runner, ask: Ask) -> tuple[object, Heard]:
    request, heard = new_request(ask), Heard()
    made.submit(request, heard)
    return request, heard


def drained(made: Runner) -> None:
    engine = made.engine
    assert not made.has_work and not engine.has_work
    assert sorted(engine.scheduler.free_slots) == list(range(len(engine.scheduler.free_slots)))
    assert not engine.scheduler.running and not engine.scheduler.waiting


# --- who drives ------------------------------------------------------------------------------------------------------


def test_submit_and_cancel_do_not_wait_for_a_step():
    made, gate = runner(), Gate()
    held, heard = submit(made, Ask([1, 2], SamplingParams(max_new_tokens=5, processors=(gate,))))
    driver = threading.Thread(target=made.run_until, args=(heard.ended.is_set,))
    driver.start()
    assert gate.reached.wait(10)
    second, told = submit(made, Ask([1, 3], GREEDY, seed=1))  # both return, though the step hangs
    made.cancel(held)
    gate.open.set()
    driver.join(10)
    assert heard.outputs[-1].finish_reason == "abort"
    made.run_until(told.ended.is_set)
    assert told.tokens == second.output_ids and second.finish_reason == "length"
    drained(made)


def test_a_thread_waits_while_another_drives_and_takes_over_when_that_leaves():
    made = runner(batch=4)
    asks = [Ask([1, i], SamplingParams(max_new_tokens=4 + 20 * i), seed=i) for i in range(4)]
    pairs = [submit(made, ask) for ask in asks]
    workers = [threading.Thread(target=made.run_until, args=(heard.ended.is_set,)) for _, heard in pairs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [request.finish_reason for request, _ in pairs] == ["length"] * 4
    drained(made)


def test_a_background_thread_drives_until_stop_which_ends_what_is_left():
    gate = Gate()
    with runner() as made:
        _, done = submit(made, Ask([1, 2], GREEDY))
        assert done.ended.wait(10)
        held, told = submit(made, Ask([1, 3], SamplingParams(max_new_tokens=200, processors=(gate,)), seed=1))
        waiting = [submit(made, Ask([1, 4], SamplingParams(max_new_tokens=200), seed=i)) for i in range(2, 5)]
        assert gate.reached.wait(10)
        gate.open.set()
    assert all(heard.ended.is_set() for _, heard in [(held, told), *waiting])
    with pytest.raises(StoppedError, match="call start"):
        submit(made, Ask([1], GREEDY))
    drained(made)
    with made:  # it opens again
        _, again = submit(made, Ask([1, 2], GREEDY))
        assert again.ended.wait(10)
    assert again.tokens == done.tokens


def test_a_step_cannot_wait_for_a_step():
    made, errors = runner(), []

    def sink(output: StepOutput) -> None:
        try:
            made.run_until(lambda: True)
        except RequestError as error:
            errors.append(error)

    request = new_request(Ask([1], SamplingParams(max_new_tokens=1)))
    made.submit(request, sink)
    made.run_until(lambda: not made.has_work)
    assert errors and "cannot wait" in str(errors[0])


def test_nobody_else_drives_the_engine():
    """One caller of `step` in the whole library."""
    found = subprocess.run(
        ["grep", "-rnE", r"engine\.(step|add|abort)\(", str(ROOT / "src")], capture_output=True, text=True
    ).stdout.splitlines()
    assert found and {Path(line.split(":")[0]).name for line in found} == {"runner.py"}


# --- whose failure it is ---------------------------------------------------------------------------------------------


def test_a_step_that_raises_ends_its_requests_and_leaves_the_runner_usable(monkeypatch):
    made = runner()
    pairs = [submit(made, Ask([1, 2, i], GREEDY, seed=i)) for i in range(3)]

    def fails(rows):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(made.engine.target, "forward", fails)
        made.run_until(lambda: pairs[0][1].ended.is_set() and pairs[1][1].ended.is_set())
    assert all(isinstance(request.error, OSError) for request, _ in pairs[:2])
    assert [heard.outputs[-1].finish_reason for _, heard in pairs[:2]] == ["error", "error"]
    made.run_until(pairs[2][1].ended.is_set)
    assert (pairs[2][0].error, pairs[2][0].num_output) == (None, 12)
    drained(made)


def test_a_sink_that_raises_ends_its_own_request():
    made = runner()
    told: list[StepOutput] = []

    def sink(output: StepOutput) -> None:
        told.append(output)
        raise ValueError("no more")

    broken = new_request(Ask([1, 2], GREEDY))
    made.submit(broken, sink)
    sound, heard = submit(made, Ask([1, 3], GREEDY, seed=1))
    made.run_until(heard.ended.is_set)
    assert isinstance(broken.error, ValueError) and told[-1].finish_reason == "error"
    assert (sound.error, sound.num_output) == (None, 12)
    drained(made)


def test_finished_results_survive_a_request_that_fails():
    llm = LLM(tiny("llama"), "ngram")
    params = [GREEDY, SamplingParams(max_new_tokens=12, processors=(Fails(),)), GREEDY]
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    wanted = [llm.generate(prompts[i], GREEDY).token_ids for i in (0, 2)]
    with pytest.raises(GenerationError, match=r"1 of 3 requests failed \(index 1; the first: KeyError") as raised:
        llm.generate(prompts, params)
    for results in (raised.value.results, llm.generate(prompts, params, on_error="return")):
        assert [result.finish_reason for result in results] == ["length", "error", "length"]
        assert [results[0].token_ids, results[2].token_ids] == wanted
        assert isinstance(results[1].error, KeyError) and len(results[1].token_ids) == 6
    with pytest.raises(KeyError):
        llm.generate(prompts[1], params[1])
    with pytest.raises(RequestError, match="on_error='ignore'"):
        llm.generate(prompts[0], on_error="ignore")
    drained(llm.runner)


# --- exact or not, aloud ---------------------------------------------------------------------------------------------


@pytest.fixture
def inexact(monkeypatch):
    """Loading finds no shapes that agree."""

    def load(source, options):
        model = load_target(source, options)
        model.row_invariance = FIXED
        return model

    monkeypatch.setattr("foredraft.assembly.load_target", load)


def test_a_promise_that_does_not_hold_is_told(inexact):
    with pytest.warns(ExactnessWarning, match="LLM\\(require_exact=True\\) refuses"):
        llm = LLM(tiny("llama"), "ngram", runtime="torch")
    assert llm.generate([1, 2, 3], GREEDY).exact is False
    with pytest.raises(ExactnessError, match="require_exact=True"):
        LLM(tiny("llama"), "ngram", runtime="torch", require_exact=True)


def test_the_drop_in_tells_too(monkeypatch):
    def load(source, options, **runtime):
        model = load_target(source, options, **runtime)
        model.row_invariance = FIXED
        return model

    assert accelerate(tiny("llama"), "ngram").exact
    monkeypatch.setattr("foredraft.integrations.recipe.load_target", load)
    with pytest.warns(ExactnessWarning, match="may change its text"):
        assert not accelerate(tiny("llama"), "ngram").exact


def test_a_result_says_whether_it_is_plain_decodings():
    llm = LLM(tiny("llama"), "ngram", require_exact=True)
    kinds = {"greedy": SamplingParams(), "coupled": SamplingParams(temperature=1.0), "rejection": None}
    kinds["rejection"] = SamplingParams(temperature=1.0, verifier="rejection")
    assert {name: llm.generate([1, 2], params).exact for name, params in kinds.items()} == {
        "greedy": True, "coupled": True, "rejection": False,
    }  # fmt: skip


# --- streams ---------------------------------------------------------------------------------------------------------

PROMPTS = [f"User: {text}\nAssistant:" for text in ("I need a table.", "Find me a hotel.", "Play some jazz.")]


@pytest.fixture(scope="module")
def bundled() -> LLM:
    return LLM(max_batch_size=6)


def text_of(llm: LLM, ids: list[int]) -> str:
    return llm.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_chunks_text_is_its_own_tokens_text_with_streams_side_by_side(bundled):
    """What another stream's steps brought must not be in it."""
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    streams = [bundled.stream(prompt, params) for prompt in PROMPTS]
    first = [next(stream) for stream in streams]
    for _ in range(3):  # the first stream drives; the chunks of the others wait for them
        next(streams[0])
    for stream, begun in zip(streams[1:], first[1:], strict=True):
        chunks = [begun, *stream]
        for chunk in chunks:
            assert chunk.text == "".join(piece for piece, _ in chunk.pieces)
            if not chunk.finish_reason:
                assert chunk.text == text_of(bundled, list(chunk.token_ids))
        assert "".join(chunk.text for chunk in chunks) == chunks[-1].result.text
    streams[0].close()
    drained(bundled.runner)


def test_a_stream_that_is_dropped_leaves_nothing(bundled):
    stream = bundled.stream(PROMPTS[0], SamplingParams(max_new_tokens=200, ignore_eos=True))
    next(stream)
    del stream
    gc.collect()
    bundled.generate(PROMPTS[1], GREEDY)
    drained(bundled.runner)


class Storm:
    """Threads that submit, stream, walk away and generate at random over one LLM; each text is compared with plain."""

    def __init__(self, llm: LLM, seconds: float) -> None:
        self.llm, self.until = llm, time.monotonic() + seconds
        self.faults: list[object] = []
        self.texts = 0
        self.asks = [(prompt, self.params(kind, count)) for prompt in PROMPTS for kind in range(3) for count in (3, 24)]
        self.wanted = [llm.generate(prompt, params, num_draft_tokens=0) for prompt, params in self.asks]

    @staticmethod
    def params(kind: int, count: int) -> SamplingParams:
        if kind == 0:
            return SamplingParams(max_new_tokens=count)
        return SamplingParams(max_new_tokens=count, temperature=0.5 * kind, seed=kind)

    def work(self, seed: int) -> None:
        source = Random(seed)
        try:
            while time.monotonic() < self.until:
                index = source.randrange(len(self.asks))
                act = source.choice((self.generate, self.stream, self.walk_away))
                act(index, source)
        except BaseException as error:
            self.faults.append(error)

    def generate(self, index: int, source: Random) -> None:
        prompt, params = self.asks[index]
        result = self.llm.generate(prompt, params, num_draft_tokens=source.choice((None, 0, 3)))
        self.check(result.token_ids == self.wanted[index].token_ids and result.text == self.wanted[index].text, index)

    def stream(self, index: int, source: Random) -> None:
        chunks = list(self.llm.stream(*self.asks[index]))
        self.check("".join(chunk.text for chunk in chunks) == self.wanted[index].text, index)
        own = all(c.finish_reason or c.text == text_of(self.llm, list(c.token_ids)) for c in chunks)
        self.check(own, index)

    def walk_away(self, index: int, source: Random) -> None:
        stream = self.llm.stream(*self.asks[index])
        tokens = [token for _ in range(source.randint(1, 2)) for token in next(stream).token_ids]
        stream.close()
        self.check(tokens == self.wanted[index].token_ids[: len(tokens)], index)

    def check(self, right: bool, index: int) -> None:
        self.texts += 1
        if not right:
            self.faults.append(self.asks[index])


def test_32_threads_over_one_llm(bundled):
    storm = Storm(bundled, STORM_SECONDS)
    workers = [threading.Thread(target=storm.work, args=(seed,), daemon=True) for seed in range(32)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(STORM_SECONDS + 120)
    assert not any(worker.is_alive() for worker in workers)
    assert storm.faults == []
    assert storm.texts > 32
    drained(bundled.runner)
    choice, (suffix, model) = bundled.engine.policy.policy, drafters_of(bundled.drafter)
    known = (*choice.candidates.values(), *choice.lookups.values())
    assert len(known) == 2 and not any(it.alpha.own for it in known) and not choice.picks
    assert not suffix.texts and not model.held and not bundled.drafter.chosen


# --- forked processes ------------------------------------------------------------------------------------------------

forks = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # with threads, which is what is tested


@forks
@pytest.mark.parametrize("started", [False, True])
def test_a_child_that_was_forked_while_others_decode_decodes_too(started):
    llm, prompt = LLM(tiny("llama"), "ngram"), draws(9)
    wanted = bytes(llm.generate(prompt, GREEDY).token_ids)
    done = threading.Event()
    jobs = [llm.job(draws(9, seed=seed), SamplingParams(max_new_tokens=900)) for seed in range(2)]

    def work() -> None:
        while not done.is_set():
            llm.generate(draws(200, seed=1), GREEDY)

    def child() -> bytes:
        text = bytes(llm.generate(prompt, GREEDY).token_ids)
        cut = [
            job.request for job in jobs if job.request.arrived and job.request.finish_reason not in ("stop", "length")
        ]
        ended = all(isinstance(request.error, StoppedError) for request in cut)
        return text if ended and not llm.engine.has_work else b"something is left"

    other = threading.Thread(target=work)
    if started:
        with llm.runner:
            for job in jobs:
                llm.runner.submit(job.request, lambda output: None)
            found = [in_a_child(child) for _ in range(3)]
            for job in jobs:
                llm.runner.cancel(job.request)
    else:
        other.start()
        found = [in_a_child(child) for _ in range(3)]
        done.set()
        other.join()
    assert found == [wanted] * 3


@forks
def test_a_stream_that_was_forked_goes_on_in_both():
    llm = LLM(tiny("llama"), "ngram")
    chunks = llm.stream(draws(9), GREEDY)
    next(chunks)
    in_child = in_a_child(lambda: bytes(token for chunk in chunks for token in chunk.token_ids))
    assert in_child and in_child == bytes(token for chunk in chunks for token in chunk.token_ids)


@forks
@pytest.mark.skipif(bool(library.why_not()), reason=library.why_not())
def test_a_child_needs_none_of_torch_s_threads():
    """Pages of the bundled pair are large enough for torch to share out their zeroing."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        llm, prompts = LLM(), [draws(9, seed=seed) for seed in range(8)]
        wanted = bytes(token % 256 for result in llm.generate(prompts, GREEDY) for token in result.token_ids)
        more = [*prompts, draws(300)]
        found = in_a_child(
            lambda: bytes(token % 256 for one in llm.generate(more, GREEDY)[:-1] for token in one.token_ids)
        )
    finally:
        torch.set_num_threads(before)
    assert found == wanted


@forks
def test_a_child_compiles_grammars():
    llm = LLM()
    form = SamplingParams(max_new_tokens=8, structured=Structured.regex("ab+c"))
    llm.generate("A", form)  # a thread that compiles is there, and idle
    other = SamplingParams(max_new_tokens=8, structured=Structured.regex("ab"))
    assert in_a_child(lambda: llm.generate("A", other).text.encode()) == b"ab"
