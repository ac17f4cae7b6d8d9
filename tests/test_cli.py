"""The command line against a model that is not there: flags, streams, encodings, pipes, interrupts, exit codes."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fake_llm import HARD, WORDS, FakeLLM
from typer.testing import CliRunner

from foredraft.cli import reference, session
from foredraft.cli.app import app
from foredraft.cli.chat import Conversation
from foredraft.cli.options import RunOptions
from foredraft.errors import RequestError
from foredraft.llm import Chunk, GenerationResult
from foredraft.types import SamplingParams

ROOT = Path(__file__).resolve().parents[1]


class Fake:
    """The CLI in this process: what was loaded, what was asked, what came out."""

    def __init__(self) -> None:
        self.llm = FakeLLM()
        self.options: list[RunOptions] = []

    def open(self, options: RunOptions, *, repeats: bool = False) -> FakeLLM:
        assert options.target_device
        self.options.append(options)
        return self.llm

    def __call__(self, *args: str, stdin: str | bytes | None = None) -> Any:
        return CliRunner().invoke(app, args, input=stdin, prog_name="foredraft", catch_exceptions=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(session, "open_llm", fake.open)
    monkeypatch.setenv("COLUMNS", "200")
    return fake


def command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "tests/fake_llm.py"), *args]


def environment(**changes: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "TERM": "xterm-256color"} | changes


def process(*args: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE, **env: str) -> Any:
    return subprocess.Popen(
        command(*args), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE, env=environment(**env), cwd=ROOT
    )


# --- flags ---


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; sys.argv = ['foredraft', 'generate', '--help']; import atexit, foredraft.cli\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'numpy', 'jinja2'} & set(sys.modules))))\n"
        "foredraft.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--max-new-tokens" in done.stdout


def test_flags_reach_the_library(run: Fake) -> None:
    flags = ["--model", "m", "--draft", "d", "--dtype", "bf16", "--device", "cpu", "--draft-device", "cuda:1"]
    flags += ["--num-draft-tokens", "5", "--policy", "fixed", "--verifier", "rejection", "--temperature", "0.7"]
    flags += ["--top-k", "40", "--top-p", "0.9", "--min-p", "0.1", "--seed", "3", "--max-new-tokens", "9"]
    flags += ["--stop", "a", "--stop", "b\n", "--ignore-eos"]
    assert run("generate", *flags, "Hello").exit_code == 0
    prompt, params, gamma = run.llm.asked[0]
    assert (prompt, gamma) == ("Hello", 5)
    assert params == SamplingParams(
        temperature=0.7, top_k=40, top_p=0.9, min_p=0.1, seed=3, max_new_tokens=9, stop=("a", "b\n"),
        ignore_eos=True, verifier="rejection",
    )  # fmt: skip
    options = run.options[0]
    assert (options.model, options.draft, options.dtype, options.policy) == ("m", "d", "bf16", "fixed")
    assert (options.target_device, options.draft_device) == ("cpu", "cuda:1")


def test_flags_reach_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def constructor(target: object, draft: object, **options: object) -> None:
        seen.update(options, target=target, draft=draft)

    monkeypatch.setattr("foredraft.llm.LLM", constructor)
    session.open_llm(
        RunOptions(
            model="m",
            draft="ngram",
            dtype="fp32",
            gpu="1",
            policy="gain",
            draft_profile=Path("p.json"),
            chat_template="t.jinja",
            trust_remote_code=True,
            weight_format="int8",
            draft_weight_format="int8",
            runtime="torch",
        )
    )
    assert seen == {
        "target": "m", "draft": "ngram", "dtype": "fp32", "device": "cuda:1", "draft_device": None, "policy": "gain",
        "draft_weight_format": "int8",
        "max_batch_size": 1, "draft_profile": Path("p.json"), "chat_template": "t.jinja", "trust_remote_code": True,
        "weight_format": "int8", "runtime": "torch", "prefix_cache": True,
    }  # fmt: skip


def test_lmflow_spellings_work_as_they_are(run: Fake) -> None:
    line = "--gpu 0 --model gpt2-xl --draft_model gpt2 --gamma 5 --max_new_tokens 512 --temperature 0.3"
    assert run("generate", *line.split(), "Hello").exit_code == 0
    options = run.options[0]
    assert (options.model, options.draft, options.target_device) == ("gpt2-xl", "gpt2", "cuda:0")
    _, params, gamma = run.llm.asked[0]
    assert (gamma, params.max_new_tokens, params.temperature) == (5, 512, 0.3)


def test_every_flag_may_be_written_with_underscores(run: Fake) -> None:
    line = "--draft_device cpu --num_draft_tokens 2 --temperature 1 --top_k 3 --top_p 0.5 --min_p 0.2 --ignore_eos"
    assert run("generate", *line.split(), "under_scores stay").exit_code == 0
    prompt, params, gamma = run.llm.asked[0]
    assert (prompt, gamma) == ("under_scores stay", 2)
    assert (params.top_k, params.top_p, params.min_p, params.ignore_eos) == (3, 0.5, 0.2, True)


def test_the_fake_answers_as_the_library_does() -> None:
    *_, last = FakeLLM().stream("Hello", SamplingParams())
    assert set(vars(last)) == {spec.name for spec in fields(Chunk)}
    assert set(vars(last.result)) | {"logprobs"} == {spec.name for spec in fields(GenerationResult)}


def test_defaults_are_the_librarys() -> None:
    assert session.sampling_params(RunOptions()) == SamplingParams()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--temperature -1 x", "temperature=-1.0 is not usable"),
        ("--top-k 5 x", "temperature=0 (greedy) contradicts top_k=5"),
        ("--verifier luck x", "verifier='luck' is not usable"),
        ("--gpu all x", "--gpu 'all' is not usable; give one index"),
        ("--gpu 1 --device cpu x", "--gpu 1 contradicts --device cpu"),
        ("--gamma 3 --policy gain x", "--gamma 3 contradicts --policy gain"),
        ("--draft none --gamma 3 x", "--draft none contradicts --gamma 3: nothing is drafted"),
        ("--draft none --policy fixed x", "--draft none contradicts --policy fixed"),
        ("--max-new-tokens many x", "--max-new-tokens"),
        ("--top-q 1 x", "No such option: --top-q"),
        ("--compare --draft none x", "--compare needs a drafter"),
        ("--compare --gamma 0 x", "--compare needs a drafter"),
        ("--compare --verifier rejection --temperature 1 x", "differ by design"),
        ("x y", "unexpected extra argument"),
        ("too\u00a0long", None),
    ],
)
def test_wrong_use_is_exit_code_2_and_no_traceback(run: Fake, flags: str, complaint: str | None) -> None:
    args = [arg.replace("\u00a0", " ") for arg in flags.split(" ")]
    done = run("generate", *args)
    assert done.exit_code == 2
    assert (complaint or "the prompt has 9 tokens") in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


def test_a_failure_is_exit_code_1_and_one_line_after_what_was_printed(run: Fake) -> None:
    done = run("generate", "fail")
    assert (done.exit_code, done.stdout) == (1, "It is a table for two\n")
    assert done.stderr == "foredraft: error: the weights are damaged\n"


def test_the_package_is_the_command() -> None:
    asked = [sys.executable, "-m", "foredraft", "--version"]
    ran = subprocess.run(asked, capture_output=True, text=True, env=environment(), check=True)
    assert ran.stdout == "foredraft 0.1.0\n"


def test_help_says_what_has_to_be_given(run: Fake) -> None:
    assert "[required]" in run("terminate", "--help").stdout
    missing = run("terminate")
    assert missing.exit_code == 2 and "Missing argument" in missing.stderr
    launch = run("launch", "--help").stdout  # a server that is told no name launches its own
    assert "[required]" not in launch and "Default: the bundled pair" in launch


def test_version_is_a_flag_and_a_command(run: Fake) -> None:
    assert run("--version").stdout == run("version").stdout == "foredraft 0.1.0\n"


# --- generate ---


def test_generate_prints_text_on_stdout_and_a_summary_on_stderr(run: Fake) -> None:
    done = run("generate", "Hello")
    assert (done.exit_code, done.stdout) == (0, "It is a table for two\n")
    (summary,) = done.stderr.splitlines()
    assert summary.startswith("6 tokens in ")
    assert "tok/s | 50.0% of 6 drafted tokens accepted | 2.00 tokens a pass | draft: fake" in summary


def test_plain_decoding_says_so(run: Fake) -> None:
    assert "draft: none" in run("generate", "--gamma", "0", "Hello").stderr


@pytest.mark.parametrize("args", [(), ("-",)])
def test_the_prompt_may_come_from_stdin(run: Fake, args: tuple[str, ...]) -> None:
    assert run("generate", *args, stdin="two\nlines é\n").exit_code == 0
    assert run.llm.asked[0][0] == "two\nlines é"


@pytest.mark.parametrize("stdin", [b"\xef\xbb\xbftwo\n", "\ufefftwo"])
def test_a_byte_order_mark_is_no_part_of_the_prompt(run: Fake, stdin: str | bytes) -> None:
    assert run("generate", stdin=stdin).exit_code == 0
    assert run("generate", "\ufefftwo").exit_code == 0
    assert [asked[0] for asked in run.llm.asked] == ["two", "two"]


def test_a_chat_file_may_begin_with_a_byte_order_mark(run: Fake) -> None:
    run.llm.tokenizer.chat_template = "t"
    assert run("chat", stdin=b"\xef\xbb\xbf/reset\nHello\n").exit_code == 0
    assert [asked[0] for asked in run.llm.asked] == [[{"role": "user", "content": "Hello"}]]


def test_a_prompt_that_begins_with_a_dash(run: Fake) -> None:
    done = run("generate", "--raw", "-5 degrees")
    assert done.exit_code == 2
    assert "foredraft generate -- '-5 degrees'" in " ".join(done.stderr.replace("│", " ").split())
    assert run("generate", "--raw", "--", "-5 degrees").exit_code == 0
    assert run.llm.asked[-1][0] == "-5 degrees"
    assert "goes after" not in run("chat", "-5").stderr  # it takes no prompt


@pytest.mark.parametrize(
    ("stdin", "complaint"),
    [("", "prompt is empty"), (" \n", "prompt is empty"), (b"\xff", "not UTF-8 text (byte 0xff at 0)")],
)
def test_a_useless_stdin_says_so(run: Fake, stdin: str | bytes, complaint: str) -> None:
    done = run("generate", stdin=stdin)
    assert done.exit_code == 2 and complaint in done.stderr and not run.options


def test_a_prompt_that_is_no_text_says_so(run: Fake) -> None:
    done = run("generate", "\udcff")
    assert done.exit_code == 2 and "not UTF-8" in done.stderr


def test_no_prompt_on_a_terminal_says_so() -> None:
    _, terminal = pty.openpty()
    with process("generate", stdin=terminal) as job:
        assert b"no prompt; give one" in job.communicate(timeout=60)[1]
    assert job.returncode == 2


@pytest.mark.parametrize(
    ("template", "flags", "chats"),
    [
        ("", [], False),
        ("t", [], True),
        ("t", ["--raw"], False),
        ("", ["--chat"], True),
    ],
)
def test_the_chat_template_is_used_where_there_is_one(run: Fake, template: str, flags: list[str], chats: bool) -> None:
    run.llm.tokenizer.chat_template = template
    assert run("generate", *flags, "Hello").exit_code == 0
    assert run.llm.asked[0][0] == ([{"role": "user", "content": "Hello"}] if chats else "Hello")


def test_a_chat_template_is_a_file_and_never_the_prompt(run: Fake) -> None:
    assert run("generate", "--chat-template", "my.jinja", "Hello").exit_code == 0
    assert (run.options[0].chat_template, run.llm.asked[0][0]) == ("my.jinja", "Hello")
    done = run("generate", "--raw", "--chat-template", "my.jinja", "Hello")
    assert done.exit_code == 2 and "--raw contradicts --chat-template" in done.stderr
    done = run("chat", "--server", "http://127.0.0.1:9", "--chat-template", "my.jinja")
    assert done.exit_code == 2 and "--server contradicts --chat-template" in done.stderr


def test_json_is_one_object_and_nothing_else(run: Fake) -> None:
    done = run("generate", "--json", "--seed", "5", "noise")
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and done.stdout.isascii()
    assert "a library prints" in done.stderr
    assert (answer["text"], answer["finish_reason"], answer["seed"]) == ("".join(WORDS), "stop", 5)
    assert (len(answer["token_ids"]), answer["prompt_tokens"]) == (6, 3)
    assert (answer["model"], answer["draft"]) == ("bundled", "fake")
    assert answer["stats"]["mean_acceptance_length"] == 2.0


def test_json_survives_characters_and_errors(run: Fake) -> None:
    assert json.loads(run("generate", "--json", "hard").stdout)["text"] == "".join(HARD)
    failed = run("generate", "--json", "fail")
    assert (failed.exit_code, failed.stdout) == (1, "")


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_not_promised_is_said(run: Fake, exact: bool) -> None:
    run.llm.exact = exact
    for flags in (["--json"], ["--json", "--compare"]):
        assert json.loads(run("generate", *flags, "Hello").stdout)["exact"] is exact
    shown = run("generate", "--compare", "Hello").stdout
    assert ("equal tokens are not promised" in shown) is not exact


# --- compare ---


def test_compare_shows_equal_tokens_and_the_speed_up(run: Fake) -> None:
    done = run("generate", "--compare", "Hello")
    assert done.exit_code == 0
    assert "It is a table for two" in done.stdout
    assert "tokens: equal (6 of 6, in all 3 runs of each)" in done.stdout
    assert "speed-up: " in done.stdout


def test_compare_says_that_a_few_tokens_say_nothing(run: Fake) -> None:
    """Of two tokens it showed 2.74 as if that were a speed-up."""
    assert "which says nothing: 6 tokens are too few, ask for 32" in run("generate", "--compare", "Hello").stdout
    assert json.loads(run("generate", "--compare", "--json", "Hello").stdout)["speedup_is_telling"] is False
    assert "says nothing" not in run("generate", "--compare", "at length").stdout
    assert json.loads(run("generate", "--compare", "--json", "at length").stdout)["speedup_is_telling"] is True


def test_compare_interleaves_and_keeps_one_seed(run: Fake) -> None:
    run("generate", "--compare", "--gamma", "4", "--temperature", "1", "Hello")
    assert [gamma for _, _, gamma in run.llm.asked] == [0, 4, 0, 4, 4, 0, 0, 4]
    assert [params.seed for _, params, _ in run.llm.asked] == [None, *[7] * 7]


def test_compare_names_what_differs_and_fails(run: Fake) -> None:
    done = run("generate", "--compare", "differ")
    assert done.exit_code == 1
    assert "tokens: DIFFERENT at 6 positions" in done.stdout
    expected, got = sum(map(ord, WORDS[2])), sum(map(ord, " no"))
    assert f"speculative run 1, position 2: {expected} '<{expected}>' became {got} '<{got}>'" in done.stdout
    assert "position 5: " in done.stdout and "became nothing" in done.stdout


def test_compare_in_json_has_both_arms(run: Fake) -> None:
    done = run("generate", "--compare", "--json", "Hello")
    answer = json.loads(done.stdout)
    assert (answer["equal"], answer["differences"], answer["rounds"]) == (True, [], 3)
    assert answer["speedup"] == answer["plain"]["median_seconds"] / answer["speculative"]["median_seconds"]
    assert answer["plain"]["token_ids"] == answer["speculative"]["token_ids"] == answer["token_ids"]
    assert answer["plain"]["stats"]["drafted"] == 0 < answer["speculative"]["stats"]["drafted"]
    arm = answer["plain"]  # of one name there is one meaning: `stats` has the last run's own
    assert arm["median_tokens_per_second"] == len(arm["token_ids"]) / arm["median_seconds"]
    assert "tokens_per_second" not in arm


def test_compare_in_json_fails_where_tokens_differ(run: Fake) -> None:
    done = run("generate", "--compare", "--json", "differ")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["equal"]) == (1, False)
    first = answer["differences"][0]
    assert (first["arm"], first["round"], first["position"]) == ("speculative", 1, 2)


# --- terminals, pipes, interrupts ---


def read_terminal(*args: str, **env: str) -> str:
    """What a terminal would get on stdout."""
    master, terminal = pty.openpty()
    with process(*args, stdout=terminal, **env) as job:
        job.communicate(timeout=60)
    os.close(terminal)
    assert job.returncode == 0
    seen = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:
            data = b""
        if not data:
            os.close(master)
            return seen.decode().replace("\r\n", "\n")
        seen += data


def test_drafted_tokens_are_green_on_a_terminal() -> None:
    assert read_terminal("generate", "Hello").startswith("It\x1b[32m is\x1b[0m a\x1b[32m table\x1b[0m for")


def test_no_colour_where_none_is_wanted() -> None:
    assert read_terminal("generate", "Hello", NO_COLOR="1") == "It is a table for two\n"
    assert read_terminal("generate", "Hello", TERM="dumb") == "It is a table for two\n"


def test_a_model_cannot_steer_the_terminal() -> None:
    assert "\ufffd[2J" in read_terminal("generate", "hard", NO_COLOR="1")


def test_a_console_that_cannot_encode_gets_question_marks() -> None:
    with process("generate", "hard", PYTHONIOENCODING="ascii") as job:
        out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (0, b"? ?? ?\x1b[2J end\n")
    assert b"Traceback" not in err
    with process("generate", "--compare", "hard", PYTHONIOENCODING="ascii") as job:
        out, err = job.communicate(timeout=60)
    assert job.returncode == 0 and b"equal" in out and b"Traceback" not in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    with process("generate", "forever") as job:
        assert job.stdout.readline() == b"again and again\n"
        job.stdout.close()
        err = job.stderr.read()
        assert job.wait(timeout=60) == 0
    assert err == b""


def test_a_reader_that_goes_away_from_a_table_is_no_error() -> None:
    with process("generate", "--compare", "Hello") as job:
        job.stdout.close()
        err = job.stderr.read()
        assert job.wait(timeout=60) == 0
    assert err == b""


@pytest.mark.parametrize("flags", [[], ["--json"], ["--compare"]], ids=str)
def test_a_full_disk_is_one_line(flags: list[str]) -> None:
    with open("/dev/full", "wb") as full, process("generate", *flags, "Hello", stdout=full.fileno()) as job:
        err = job.communicate(timeout=60)[1]
    assert job.returncode == 1
    line = b"foredraft: error: standard output cannot be written: No space left on device"
    assert err.splitlines()[-1] == line and b"Traceback" not in err


@pytest.mark.parametrize(("closed", "code", "out"), [(">&-", 1, b""), ("2>&-", 0, b"It is a table for two\n")])
def test_closed_streams(closed: str, code: int, out: bytes) -> None:
    line = f"exec {shlex.join(command('generate', 'Hello'))} {closed}"
    done = subprocess.run(line, shell=True, capture_output=True, env=environment(), cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (code, out)
    assert b"Traceback" not in done.stderr


def test_ctrl_c_while_libraries_are_imported() -> None:
    code = "from foredraft import cli\nimport os, signal\nfrom foredraft.cli import session\n"
    code += "session.sampling_params = lambda options: os.kill(os.getpid(), signal.SIGINT)\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code, "generate", "x"], capture_output=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize("encoding", ["C", "en_US.ISO-8859-1"])
def test_a_prompt_is_utf8_whatever_the_locale(encoding: str) -> None:
    with process("generate", "Caf\u00e9", LC_ALL=encoding, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") as job:
        out, err = job.communicate(timeout=60)
    assert (job.returncode, out) == (0, b"It is a table for two\n"), err


def test_ctrl_c_keeps_what_was_printed_and_sums_up() -> None:
    with process("generate", "forever") as job:
        line = job.stdout.readline()
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert (line + out).startswith(b"again and again\n")
    assert err.startswith(b"interrupted; ") and b"tok/s" in err and b"Traceback" not in err


@pytest.mark.parametrize("flag", ["--json", "--compare"])
def test_ctrl_c_without_a_stream_is_quiet(flag: str) -> None:
    with process("generate", flag, "forever", PYTHONUNBUFFERED="1", FAKE_READY="1") as job:
        assert job.stderr.readline() == b"ready\n"
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=60)
    assert (job.returncode, out, err) == (130, b"", b"interrupted\n")


# --- chat ---


def test_chat_keeps_the_conversation_until_reset(run: Fake) -> None:
    run.llm.tokenizer.chat_template = "t"
    done = run("chat", "--system", "Be brief.", stdin="Hello\n\nMore\n/reset\nAgain\n/exit\nnever\n")
    assert done.exit_code == 0
    assert done.stdout == "It is a table for two\n" * 3
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "".join(WORDS)}
    assert [messages for messages, _, _ in run.llm.asked] == [
        [system, {"role": "user", "content": "Hello"}],
        [system, {"role": "user", "content": "Hello"}, answer, {"role": "user", "content": "More"}],
        [system, {"role": "user", "content": "Again"}],
    ]


def test_chat_ends_at_the_end_of_input(run: Fake) -> None:
    run.llm.tokenizer.chat_template = "t"
    assert run("chat", stdin="Hello").exit_code == 0
    assert len(run.llm.asked) == 1


def test_chat_takes_the_flags_of_generate(run: Fake) -> None:
    run.llm.tokenizer.chat_template = "t"
    assert run("chat", "--gamma", "3", "--max_new_tokens", "7", stdin="Hello\n").exit_code == 0
    _, params, gamma = run.llm.asked[0]
    assert (gamma, params.max_new_tokens) == (3, 7)


def test_chat_needs_a_template(run: Fake) -> None:
    done = run("chat", stdin="Hello\n")
    assert done.exit_code == 2 and "no chat template; use `foredraft generate`" in done.stderr


def test_a_turn_that_fails_leaves_no_trace(run: Fake) -> None:
    run.llm.tokenizer.chat_template = "t"
    done = run("chat", stdin="too long\n/what now\nHello\n")
    assert done.exit_code == 0
    assert "no longer fits the model" in done.stderr and "/what is no command" in done.stderr
    assert run.llm.asked[-1][0] == [{"role": "user", "content": "Hello"}]


def test_a_refused_turn_leaves_no_trace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM("t")
    conversation = Conversation(llm, SamplingParams())  # type: ignore[arg-type]

    def refuse(*args: object, **options: object) -> Iterator[Chunk]:
        raise RequestError("roles must alternate")

    monkeypatch.setattr(llm, "stream_chat", refuse)
    assert conversation.react("Hello")
    assert conversation.messages == []
    assert "roles must alternate" in capsys.readouterr().err


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    env = {"XDG_STATE_HOME": str(tmp_path), "FAKE_TEMPLATE": "t"}
    with process("chat", stdin=terminal, **env) as job:
        os.write(master, b"go on forever\n")
        assert b"again" in job.stdout.readline()
        job.send_signal(signal.SIGINT)
        while b"interrupted; " not in (line := job.stderr.readline()):
            assert line
        os.write(master, b"Hello\n")
        while b"6 tokens" not in (line := job.stderr.readline()):
            assert line
        job.send_signal(signal.SIGINT)  # at the prompt: a hint
        while b"/exit" not in (line := job.stderr.readline()):
            assert line
        os.write(master, b"/exit\n")
        assert job.wait(timeout=60) == 0
    os.close(master)
    os.close(terminal)


# --- documentation, and the real thing ---


def test_the_documented_flags_are_current() -> None:
    found = set()
    for name in ("docs/cli.md", "docs/tuning.md", "docs/bench.md", "docs/audit.md"):
        document = (ROOT / name).read_text(encoding="utf-8")
        found |= {match[2] for match in reference.MARKED.finditer(document)}
        assert reference.embed(document) == document, f"run: python -m foredraft.cli.reference {name}"
    assert found == {*reference.TABLES, None}  # None: the table of drafters
    assert "| `--num-draft-tokens` `--gamma` |" in (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def real(*args: str) -> Any:
    return CliRunner().invoke(app, args, prog_name="foredraft", catch_exceptions=False)


def test_a_real_model_end_to_end(shared: Path) -> None:
    model = str(shared / "models/stories3M")
    args = ["--model", model, "--draft", model, "--gamma", "3", "--max-new-tokens", "24", "Once upon a time"]
    done = real("generate", "--json", "--compare", *args)
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["equal"], len(answer["token_ids"])) == (0, True, 24)
    assert real("generate", *args).stdout == answer["text"] + "\n"


def test_the_bundled_pair_answers_on_topic() -> None:
    done = real(
        "generate", "--json", "--compare", "--max-new-tokens", "64", "I need a table for two in Oakland tonight"
    )
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["equal"], answer["finish_reason"]) == (0, True, "stop")
    assert any(word in answer["text"].lower() for word in ("restaurant", "time", "table", "reserv", "eat", "food"))
