"""What a stranger's form may cost: it fails alone, and neither compiling nor following it stops anybody else."""

import asyncio
import json
import sys
import threading

import pytest

from foredraft import LLM, SamplingParams, Structured
from foredraft.errors import GenerationError, GrammarError, LateError
from foredraft.structured import compile, source, trial
from foredraft.structured.compile import AT_ONCE, Grammars
from foredraft.structured.matcher import GrammarConstraint
from foredraft.structured.meter import ALLOWANCE, BRIEF, CREDIT, Meter
from foredraft.structured.spec import MAX_LITERAL
from foredraft.structured.trial import Trials, Vocabulary

pytest.importorskip("llguidance.hf")
PROMPT = "User: I need a table for two in Oakland tonight.\nAssistant: "
FOR_EVER = {"type": "string", "allOf": [{"pattern": f"^(.*[ab]){{{i}}}.*$"} for i in range(1, 60)]}  # 2^60 steps
BYTES = Vocabulary(300, ("<end>",))


def slow_form(i: int) -> Structured:
    return Structured.json_schema(FOR_EVER | {"description": str(i)})


def references(length: int) -> dict:
    links = {f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length}": {"type": "null"}}}


def rules(length: int) -> Structured:
    lines = ["start: r0", *(f'r{i}: "a" r{i + 1}' for i in range(length)), f'r{length}: "b"']
    return Structured.grammar("\n".join(lines))


def optional(count: int) -> dict:
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(count)}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_batch_size=4)


def params(form, **options) -> SamplingParams:
    return SamplingParams(structured=form, **{"max_new_tokens": 30} | options)


# --- compiling ------------------------------------------------------------------------------------------------------


def test_forms_that_never_compile_fail_alone_and_hold_no_step_up(llm, monkeypatch):
    """More than compile at once, all before the one that is fine: its wait is not held against it."""
    monkeypatch.setattr(compile, "QUICK", 0.1)
    grammars = Grammars(llm.tokenizer, 4096, seconds=1.1)
    stream = llm.stream(PROMPT, SamplingParams(max_new_tokens=8))
    next(stream)
    found: list[object] = [None] * (AT_ONCE + 1)

    def ask(i: int) -> None:
        try:
            found[i] = grammars.constraint(slow_form(i), (0,))
        except GrammarError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    assert next(stream).token_ids  # other texts go on
    assert grammars.constraint(Structured.regex("fine"), (0,)).forced(9)
    for thread in threads:
        thread.join()
    assert set(found) == {"the JSON schema takes longer than 1.1 s to compile; make it simpler"}


def test_a_quick_form_overtakes_slow_ones(llm, monkeypatch):
    done: list[str] = []
    started = threading.Semaphore(0)
    release = threading.Event()

    class Scripted:
        def run(self, form, vocabulary, seconds):
            if form.source != "quick":
                if seconds < 9:
                    raise LateError("too long for now")
                started.release()
                release.wait(60)
            done.append(form.source)

    monkeypatch.setattr(compile, "trials", Scripted)
    grammars = Grammars(llm.tokenizer, 4096, seconds=9)
    slow = [Structured.regex(f"slow{i}") for i in range(3 * AT_ONCE)]
    threads = [threading.Thread(target=grammars.constraint, args=(form, (0,))) for form in slow]
    for thread in threads:
        thread.start()
    for _ in range(AT_ONCE):
        started.acquire()
    try:
        grammars.constraint(Structured.regex("quick"), (0,))
        assert done == ["quick"]
    finally:
        release.set()
    for thread in threads:
        thread.join()
    assert sorted(done) == ["quick", *(form.source for form in slow)]


def test_a_server_s_other_requests_are_not_held_up_by_forms_that_wait(monkeypatch):
    pytest.importorskip("fastapi")
    from foredraft.server.backend import FORMS, EngineModel
    from foredraft.server.metrics import Metrics
    from foredraft.server.service import Ask
    from foredraft.server.settings import Limits

    release = threading.Event()

    class Blocked:
        def run(self, form, vocabulary, seconds):
            release.wait(60)

    monkeypatch.setattr(compile, "trials", Blocked)

    async def scene() -> None:
        llm = LLM(draft="none", max_batch_size=1)
        model = EngineModel(llm, Limits(), Metrics().of("x"), asyncio.get_running_loop())
        forms = [Ask(params(Structured.regex(f"form{i}")), PROMPT) for i in range(FORMS)]
        waiting = [asyncio.create_task(model.prepare([ask])) for ask in forms]
        await asyncio.sleep(0)
        try:
            plain = await model.prepare([Ask(SamplingParams(), PROMPT)])
            assert len(plain) == 1 and not any(task.done() for task in waiting)
        finally:
            release.set()
        await asyncio.gather(*waiting)
        model.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    "form, message",
    [
        (references(3000), "refers too deep"),  # llguidance runs out of stack, which would end this process
        (rules(3000), "refers too deep"),
        (optional(1000), "followed beyond 1 tokens"),
        ({"properties": {"a": {"const": "x" * 10_001}}}, "10,001 characters at #/properties/a; at most 10,000"),
        ({"enum": ["x" * 10_001]}, "10,001 characters at #; at most 10,000"),
        ({"properties": 3, "enum": 4}, "cannot be compiled at #"),
    ],
)
def test_what_costs_too_much_is_refused(llm, form, message):
    with pytest.raises(GrammarError, match=message):
        llm.generate(PROMPT, params(form))


def test_a_grammar_of_too_many_symbols_is_refused(llm, monkeypatch):
    monkeypatch.setattr(source, "MAX_SYMBOLS", 200)
    with pytest.raises(GrammarError, match="too many symbols, at most 200 are compiled"):
        llm.generate(PROMPT, params(optional(80)))


def test_long_choices_are_refused_and_the_longest_that_are_not_are_followed(llm):
    with pytest.raises(GrammarError, match="a string of 200,000 characters; at most 10,000"):
        Structured.choice(["ab" * 100_000, "ba"])
    text = "ab" * (MAX_LITERAL // 2)
    assert text.startswith(llm.generate(PROMPT, params(Structured.choice([text]))).text)


def test_a_trial_tells_where_a_fault_is_and_a_lost_process_is_replaced():
    trials = Trials()
    fault = Structured.json_schema({"properties": {"a": {"type": "strng"}}})
    for _ in range(2):
        assert trials.run(fault, BYTES) == "#/properties/a"
        (child,) = trials._idle
        child.kill()
        child.wait()
    assert trials.run(Structured.regex("a"), BYTES) is None
    assert child not in trials._idle


def test_where_no_process_can_be_started_that_is_said(llm, monkeypatch):
    monkeypatch.setattr(compile, "trials", Trials)
    for name, value in (("executable", "/nowhere/python"), ("frozen", True)):
        monkeypatch.setattr(sys, name, value, raising=False)
        with pytest.warns(RuntimeWarning, match="no process can be started to try the forms"):
            assert Grammars(llm.tokenizer, 4096).constraint(Structured.regex("ab"), (0,)).forced(9)


def test_the_program_answers_line_by_line(capsys, monkeypatch):
    asked = [Structured.regex("a"), Structured.json_schema({"type": "strng"}), Structured.regex("(")]
    lines = [json.dumps([{"kind": form.kind, "source": form.source}, {"size": 300, "marks": []}, 9]) for form in asked]
    monkeypatch.setattr(trial, "_stop_after", float)  # which would be this process
    trial.answer_all(iter(lines), sys.stdout)  # type: ignore[arg-type]  # lines are all it asks for
    assert capsys.readouterr().out.split("\n") == ["null", "null", '"#"', "null", ""]


# --- following ------------------------------------------------------------------------------------------------------


class Clock:
    """Goes on by so many seconds whenever it is read."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def by(clock: Clock) -> Meter:
    return Meter(clock, clock)


def test_a_busy_machine_makes_nothing_dear():
    """Calls that wait for the processor: but for the first one, their thread's own time counts."""
    meter = Meter(Clock(1.0), Clock(ALLOWANCE / 2))
    for _ in range(1000):
        meter.timed(len, ())
        meter.allow(1)
        assert not meter.low
    meter = Meter(Clock(BRIEF / 2), Clock(float("inf")))
    for _ in range(int(CREDIT / BRIEF) + 1):
        meter.timed(len, ())
    assert meter.low and meter.credit > 0  # brief calls are charged too, by the wall


def test_dear_calls_among_brief_ones_are_charged_whole():
    """Each token asks for a mask, which may take long, and then takes the token in, which does not."""
    clock = Clock(0.0)
    meter, taken = by(clock), (0.3, 0.0001)
    for step in range(12):
        clock.step = taken[step % 2]
        meter.timed(len, ())
    with pytest.raises(GrammarError, match="costs too much to follow"):
        meter.check()


def test_a_meter_forgives_what_is_cheap_and_refuses_what_is_dear():
    cheap, dear = by(Clock(ALLOWANCE / 2)), by(Clock(2 * ALLOWANCE))
    for _ in range(1000):
        cheap.timed(len, ())
        cheap.allow(1)
        cheap.check()
        assert not cheap.low
    for _ in range(int(CREDIT / ALLOWANCE) + 1):
        dear.timed(len, ())
        dear.allow(1)
    assert dear.low
    with pytest.raises(GrammarError, match="costs too much to follow: more than 20 ms a token"):
        dear.check()


@pytest.fixture
def dear(llm, monkeypatch):
    """Makes one form cost so many seconds a call of its matcher."""
    costs: dict[Structured, float] = {}
    constraint = llm.grammars.constraint

    def made(form: Structured, ends: tuple[int, ...]) -> GrammarConstraint:
        found = constraint(form, ends)
        if form in costs:
            found.meter = by(Clock(costs[form]))
        return found

    monkeypatch.setattr(llm.grammars, "constraint", made)
    return costs


def test_a_text_whose_form_is_too_dear_ends_alone(llm, dear):
    form, other = Structured.regex("[a-z ]{1,200}"), Structured.regex("[a-z ]{1,201}")
    alone = llm.generate(PROMPT, params(other))
    dear[form] = 3 * ALLOWANCE
    with pytest.raises(GenerationError, match="costs too much to follow") as caught:
        llm.generate([PROMPT] * 3, [params(form, max_new_tokens=100), params(other), SamplingParams(max_new_tokens=9)])
    ended, *others = caught.value.results
    assert isinstance(ended.error, GrammarError) and ended.finish_reason == "error"
    assert others[0].token_ids == alone.token_ids and len(others[1].token_ids) == 9
    assert alone.text.startswith(ended.text)


def test_looking_ahead_stops_where_it_is_dear_and_changes_no_text(llm, dear):
    """A mask costs nearly what a token adds: drafts ask for several, so there are fewer of them, and no error."""
    form = Structured.regex("[a-z ]{1,400}")
    asked = params(form, max_new_tokens=200)
    free = llm.generate(PROMPT, asked, num_draft_tokens=4)
    dear[form] = ALLOWANCE / 2.5  # a step of plain decoding asks twice
    held = llm.generate(PROMPT, asked, num_draft_tokens=4)
    assert held.token_ids == free.token_ids and held.finish_reason == free.finish_reason
    assert 0 < held.stats.drafts < free.stats.drafts


class Fragile:
    """A matcher that gives up for good when it takes in a certain token."""

    def __init__(self, matcher, poison: int, failed: bool = False) -> None:
        self.matcher, self.poison, self.failed = matcher, poison, failed

    def __getattr__(self, name: str):
        return getattr(self.matcher, name)

    def deep_copy(self) -> "Fragile":
        return Fragile(self.matcher.deep_copy(), self.poison)

    def is_error(self) -> bool:
        return self.failed

    def get_error(self) -> str:
        return "too many expressions constructed"

    def try_consume_tokens(self, tokens: list[int]) -> int:
        self.failed |= self.poison in tokens
        return 0 if self.failed else int(self.matcher.try_consume_tokens(tokens))


def test_a_guess_that_is_too_complex_is_an_error_only_if_the_text_gets_there(llm):
    """The matcher never gets over it, so another takes its place."""
    grammars = llm.grammars
    a, b, c = llm.tokenizer.convert_tokens_to_ids(["a", "b", "c"])
    constraint = grammars.constraint(Structured.regex("[abc]{1,9}"), (0,))
    calm = grammars.constraint(Structured.regex("[abc]{1,9}"), (0,))
    constraint.start = Fragile(constraint.start, c)
    constraint.matcher = constraint.start.deep_copy()
    for text in ((a,), (b, a)):
        with pytest.raises(GrammarError, match="cannot be followed: too many expressions constructed"):
            constraint.allowed_after([(), (b,), (b, c)])
        assert constraint.allowed_after([(), (b,)]) == calm.allowed_after([(), (b,)])
        assert constraint.allowed((a, b)) == 2
        constraint.commit(text)
        calm.commit(text)
    with pytest.raises(GrammarError, match="too many expressions"):
        constraint.commit((c,))


def test_a_drafter_that_comes_to_what_is_too_complex_stops_nobody(llm, monkeypatch):
    def lost(self, *_):
        raise GrammarError("too complex")

    form = Structured.regex("[a-z ]{1,60}")
    wanted = llm.generate([PROMPT] * 2, [params(form), SamplingParams(max_new_tokens=20)])
    monkeypatch.setattr(GrammarConstraint, "allowed", lost)
    monkeypatch.setattr(GrammarConstraint, "forced", lost)
    found = llm.generate([PROMPT] * 2, [params(form), SamplingParams(max_new_tokens=20)])
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
