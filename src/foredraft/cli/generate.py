"""`foredraft generate`: one prompt in, the text that follows out."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import typer

from foredraft.cli import session
from foredraft.cli.compare import Comparison, compare
from foredraft.cli.console import FAILURE, INTERRUPTED, only_result, printing, write_result
from foredraft.cli.options import GenerateOptions, takes
from foredraft.errors import RequestError

if TYPE_CHECKING:
    from foredraft import LLM, GenerationResult

BYTE_ORDER_MARK = "\ufeff"  # how some editors begin a file; no part of its text


@takes(GenerateOptions)
def generate(options: GenerateOptions) -> None:
    """Go on from PROMPT, or answer it where the model has a chat template; print the text as it comes."""
    if options.chat is False and options.chat_template is not None:
        raise RequestError("--raw contradicts --chat-template: nothing goes through it; drop one of them")
    prompt = read_prompt(options.prompt)
    if options.compare:
        check_comparable(options)
    if options.json:
        print_json(options, prompt)
    elif options.compare:
        llm, params = session.start(options, repeats=True)
        comparison = compare(ask(llm, prompt, options.chat), params, options.num_draft_tokens)
        with printing():
            comparison.print()
        finish(comparison)
    else:
        llm, params = session.start(options)
        answer = session.print_answer(ask(llm, prompt, options.chat), params, options.num_draft_tokens)
        if answer.interrupted:
            raise typer.Exit(INTERRUPTED)


def read_prompt(prompt: str | None) -> str:
    """The argument, or stdin without its last line break. Raises RequestError where it is empty or no text."""
    if prompt is None and session.interactive():
        raise RequestError("no prompt; give one as an argument, or pipe it into stdin")
    if prompt in (None, "-"):
        data = sys.stdin.buffer.read()
        try:
            prompt = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin is not UTF-8 text (byte {data[error.start]:#04x} at {error.start})") from error
    assert prompt is not None
    prompt = prompt.removeprefix(BYTE_ORDER_MARK)
    if not prompt.strip():
        raise RequestError("the prompt is empty; give some text to go on from")
    try:
        return os.fsencode(prompt).decode("utf-8")  # in whatever encoding Python took the bytes to be
    except UnicodeError as error:
        raise RequestError(f"the prompt {prompt!a} is not UTF-8 text") from error


def ask(llm: "LLM", prompt: str, chat: bool | None) -> session.Question:
    if chat is None:
        chat = bool(llm.tokenizer.chat_template)
    return session.Question(llm, [{"role": "user", "content": prompt}] if chat else prompt)


def check_comparable(options: GenerateOptions) -> None:
    if options.draft == "none" or options.num_draft_tokens == 0:
        raise RequestError("--compare needs a drafter to compare with plain decoding; drop --draft none or --gamma 0")
    if options.verifier == "rejection" and options.temperature > 0:
        raise RequestError(
            "--compare with --verifier rejection would differ by design: it keeps the distribution, not the tokens; "
            "use --verifier coupled, or --temperature 0"
        )


def print_json(options: GenerateOptions, prompt: str) -> None:
    comparison = None
    with only_result() as stdout:
        llm, params = session.start(options, repeats=options.compare)
        question = ask(llm, prompt, options.chat)
        if options.compare:
            comparison = compare(question, params, options.num_draft_tokens)
            result, extra = comparison.speculative.results[-1], comparison.as_dict()
        else:
            result, extra = question.ask(params, options.num_draft_tokens), {}
        drafter = "none" if options.num_draft_tokens == 0 else llm.drafter.name
        answer = describe(result) | {"model": options.model or "bundled", "draft": drafter} | extra
        write_result(stdout, json.dumps(answer))
    if comparison:
        finish(comparison)


def describe(result: "GenerationResult") -> dict[str, Any]:
    parts = {"reasoning": result.reasoning, "answer": result.answer} if result.answer_start else {}
    return {
        "text": result.text,
        **parts,
        "token_ids": result.token_ids,
        "from_draft": result.from_draft,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "seed": result.seed,
        "exact": result.exact,
        "stats": result.stats.as_dict(),
    }


def finish(comparison: Comparison) -> None:
    if not comparison.equal:
        raise typer.Exit(FAILURE)
