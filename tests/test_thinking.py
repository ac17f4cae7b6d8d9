"""Models that think first: thoughts are free, the form holds from the answer on, and calls are read from there."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from foredraft import LLM, SamplingParams, Structured
from foredraft.llm import BUNDLED
from foredraft.structured.constraint import members
from foredraft.structured.thinking import AfterThinking, Parting, Phase, Thinking
from foredraft.text import render_chat

pytest.importorskip("llguidance")
pytest.importorskip("llguidance.hf")
jsonschema = pytest.importorskip("jsonschema")
OPENING, CLOSING, BRACE = 4094, 4095, 92
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oakland", "Berkeley"]},
        "people": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
FIND = {"name": "find", "parameters": SCHEMA}
MESSAGES = [{"role": "user", "content": "A table in Oakland?"}]
TEMPLATE = (  # Qwen 3 leaves it to the model, or closes the block; DeepSeek R1 opens it
    '{% if tools %}<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}\n{% endfor %}assistant:"
    "{% if enable_thinking is defined %}{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}"
)


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """The bundled one, whose two last tokens are the marks now."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {text: i for text, i in state["model"]["vocab"].items() if i < OPENING}
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) in vocab]
    state["model"]["vocab"] = vocab | {"<think>": OPENING, "</think>": CLOSING}
    like = state["added_tokens"][0] | {"special": False}
    marks = {OPENING: "<think>", CLOSING: "</think>"}
    state["added_tokens"] += [like | {"id": token, "content": mark} for token, mark in marks.items()]
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer.from_str(json.dumps(state)), eos_token=tokenizer.eos_token
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(BUNDLED / "target", "int4", tokenizer=thinking_tokenizer())


def said(llm: LLM, at: dict[int, int], tools=(), **arguments) -> SamplingParams:
    """A form, and tokens that the model wants above all at some places of its turn."""
    start = len(render_chat(llm.tokenizer, MESSAGES, tools, arguments))

    def insist(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = at.get(ids.shape[1] - start)
        return scores if token is None else scores.index_add(1, torch.tensor([token]), torch.tensor([[1e4]]))

    return SamplingParams(structured=SCHEMA, max_new_tokens=60, processors=(insist,), temperature=0.8, seed=3)


@pytest.mark.parametrize(
    "at, arguments, thinks",
    [
        ({0: OPENING, 9: CLOSING}, {}, True),
        ({8: CLOSING}, {"enable_thinking": True}, True),
        ({0: BRACE, 4: CLOSING}, {}, False),  # answers at once
        ({0: OPENING, 4: CLOSING}, {"enable_thinking": False}, False),  # a mark would be no answer
    ],
)
def test_the_answer_has_its_form_and_thoughts_are_free(llm, at, arguments, thinks):
    params = said(llm, at, **arguments)
    drafted = llm.chat(MESSAGES, params, template_arguments=arguments or None)
    plain = llm.chat(MESSAGES, params, template_arguments=arguments or None, num_draft_tokens=0)
    assert drafted.token_ids == plain.token_ids
    jsonschema.validate(json.loads(drafted.answer), SCHEMA)
    assert drafted.finish_reason == "stop" and drafted.stats.accepted
    assert drafted.text.endswith(drafted.answer) and bool(drafted.reasoning) == thinks == ("</think>" in drafted.text)
    if thinks:
        thoughts = drafted.token_ids[int(0 in at) : max(at)]
        assert drafted.token_ids[max(at)] == CLOSING
        assert drafted.reasoning == llm.tokenizer.decode(thoughts, skip_special_tokens=True).strip()
    else:
        assert drafted.answer == drafted.text


def test_a_text_cut_off_amid_thoughts_has_no_answer_and_does_not_end_there(llm):
    wants_to_end = {0: OPENING, **dict.fromkeys(range(2, 20), llm.tokenizer.eos_token_id)}
    result = llm.chat(MESSAGES, replace(said(llm, wants_to_end), max_new_tokens=12))
    assert (result.finish_reason, len(result.token_ids), result.answer) == ("length", 12, "")
    assert result.reasoning and "<think>" not in result.reasoning


def test_calls_are_read_from_the_answer_alone(llm):
    thought = llm.tokenizer.encode('<tool_call>\n{"name": "find", "arguments": {}}\n</tool_call>')
    at = dict(enumerate([OPENING, *thought, CLOSING]))
    params = replace(said(llm, at, [FIND]), structured=None, max_new_tokens=len(at) + 70)
    result = llm.chat(MESSAGES, params, tools=[FIND], tool_choice="required")
    assert result.text.count('"name": "find"') > len(result.tool_calls) >= 1
    for call in result.tool_calls:
        jsonschema.validate(call.arguments, SCHEMA)
    assert result.reasoning.startswith("<tool_call>")


def test_where_a_turn_begins_to_think():
    tokenizer = thinking_tokenizer()
    asked = [{"role": "user", "content": "What is <think>?"}]
    phases = {None: Phase.START, True: Phase.THINKING}
    for enabled, phase in phases.items():
        arguments = None if enabled is None else {"enable_thinking": enabled}
        found = Thinking.of(tokenizer, render_chat(tokenizer, asked, arguments=arguments))
        assert found is not None and found.phase is phase
    assert Thinking.of(tokenizer, render_chat(tokenizer, asked, arguments={"enable_thinking": False})) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Thinking.of(tokenizer, [5, OPENING]) is None  # a template without thoughts
    plain = AutoTokenizer.from_pretrained(BUNDLED / "target")
    plain.chat_template = TEMPLATE
    assert Thinking.of(plain, [5]) is None  # marks that are no tokens


def test_marks_that_are_no_tokens_are_told_where_a_form_is_asked():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "target")
    tokenizer.chat_template = TEMPLATE
    llm = LLM(BUNDLED / "target", "none", tokenizer=tokenizer)
    few, formed = SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=2, structured=SCHEMA)
    for arguments in (None, {"enable_thinking": True}):
        with pytest.warns(
            RuntimeWarning, match=r"<think> and </think>, which are no single tokens .* from the first token"
        ):
            llm.chat_job(MESSAGES, formed, template_arguments=arguments)
        with pytest.warns(RuntimeWarning, match="thoughts cannot be told from the answer"):
            llm.chat_job(MESSAGES, few, tools=[FIND], tool_choice="required", template_arguments=arguments)
        llm.chat_job(MESSAGES, few, template_arguments=arguments)  # nothing to hold
    llm.chat_job(MESSAGES, formed, template_arguments={"enable_thinking": False})  # closed by the template


def test_what_is_asked_ahead_leaves_no_trace(llm):
    """Drafts that go through the closing mark, an empty line and into the answer."""
    tokenizer = llm.tokenizer
    newline = tokenizer.encode("\n")[0]
    a, b, end = (*tokenizer.convert_tokens_to_ids(["a", "b"]), 0)
    thinking = Thinking(OPENING, CLOSING, frozenset({newline}), Phase.START)
    grammars = llm.grammars
    assert grammars is not None
    asked = AfterThinking(grammars.constraint(Structured.regex("[ab]{2,3}"), (end,)), thinking, (end,), 4096)

    def after(*path: int) -> set[int]:
        return set(members(asked.allowed_after([path])[0]))

    for _ in range(2):
        assert {OPENING, a, b} <= after() and newline not in after() and end not in after()
        assert after(OPENING) == after(OPENING, b) == set(range(4096)) - {end}
        assert {newline, a} <= after(OPENING, CLOSING) and OPENING not in after(OPENING, CLOSING)
        assert after(OPENING, CLOSING, newline) == after(OPENING, CLOSING) - {newline}
        assert after(OPENING, CLOSING, a, b) >= {a, end} and after(a, b) >= {a, end}
        assert asked.allowed((OPENING, 7, CLOSING, newline, a, b, newline)) == 6
        assert asked.allowed((OPENING, 7, end, a)) == 2
        assert asked.allowed((newline,)) == 0
        assert asked.forced(5) == ()
    asked.commit([OPENING, 7])
    asked.commit([CLOSING, newline, a])
    assert {a, b} <= after() and not after() & {OPENING, newline, end}
    asked.commit([b, a])
    assert after() == {end} and asked.forced(5) == (end,)


@pytest.mark.parametrize(
    "phase, text, thought, answer",
    [
        (Phase.START, "<think>\nlet me see\n</think>\n\n{}", "let me see", "{}"),
        (Phase.START, "<b> {}", "", "<b> {}"),
        (Phase.START, "<thin", "", "<thin"),
        (Phase.THINKING, "\na </b> c </thin\n", "a </b> c </thin", ""),
        (Phase.THINKING, "a</think>b</think>\n", "a", "b</think>\n"),
        (Phase.THINKING, "</think>", "", ""),
    ],
)
def test_a_text_is_parted_alike_however_it_comes(phase, text, thought, answer):
    for size in range(1, len(text) + 1):
        parting = Parting(phase)
        starts = range(0, len(text), size)
        parts = [parting.take(text[i : i + size], last=i + size >= len(text)) for i in starts]
        assert ["".join(part) for part in zip(*parts, strict=True)] == [thought, answer], size


@pytest.mark.parametrize("closing", [0.0, 100.0])  # never, at once
def test_a_server_tells_thoughts_and_answers_apart(llm, closing):
    """Whole, streamed and with a draft's details; a form is that of the content."""
    pytest.importorskip("fastapi")
    from foredraft.server.backend import _job
    from foredraft.server.generation import Text
    from foredraft.server.metrics import Metrics
    from foredraft.server.service import Ask
    from foredraft.server.tool_calls import message

    bias = {CLOSING: closing} if closing else {}
    params = SamplingParams(structured=SCHEMA, max_new_tokens=60, temperature=0.8, seed=3, logit_bias=bias)
    ask = Ask(messages=MESSAGES, params=params, template_arguments={"enable_thinking": True})
    shown = []
    for stream, details in ((False, False), (True, False), (True, True)):
        mail: Any = SimpleNamespace(beat=0, interval=0.0)  # a delta for each step
        text = Text(0, _job(llm, ask), "int4", Metrics().of("x"), stream, details, mail)
        deltas = []
        llm.runner.submit(text.job.request, lambda output, text=text, deltas=deltas: deltas.append(text.take(output)))
        llm.runner.run_until(lambda text=text: text.job.request.finish_reason is not None)
        whole = text.end()
        if stream:
            parts = [delta for delta in deltas if delta is not None]
            assert "".join(delta.text for delta in parts) == whole.text
            assert "".join(delta.reasoning for delta in parts) == whole.reasoning
        shown.append((whole.text, whole.reasoning))
    assert len(set(shown)) == 1
    if closing:
        jsonschema.validate(json.loads(whole.text), SCHEMA)
        assert "reasoning_content" not in message(whole)
    else:
        assert message(whole)["reasoning_content"] == whole.reasoning and not whole.text
