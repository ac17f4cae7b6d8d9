"""The commands by name."""

import shlex
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from foredraft import __version__
from foredraft.cli.audit import audit
from foredraft.cli.bench import bench
from foredraft.cli.chat import chat
from foredraft.cli.convert import convert
from foredraft.cli.doctor import doctor
from foredraft.cli.generate import generate
from foredraft.cli.launch import launch, list_models, terminate
from foredraft.cli.serve import serve
from foredraft.cli.tune import tune

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "tune": tune,
    "bench": bench,
    "audit": audit,
    "doctor": doctor,
    "serve": serve,
    "launch": launch,
    "list": list_models,
    "terminate": terminate,
}


class Command(TyperCommand):
    """A command whose error for an unknown flag says how a prompt may begin with a dash."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption" and any(param.name == "prompt" for param in self.params):
                _suggest_dashes(error, given)
            raise


def _suggest_dashes(error: Any, args: list[str]) -> None:
    prompt = next((arg for arg in args if arg.startswith(error.option_name)), error.option_name)
    usage = f"foredraft generate -- {shlex.quote(prompt)}"
    error.message = f"{error.message}. A prompt that begins with a dash goes after --: {usage}"


app = typer.Typer(
    name="foredraft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # --max_new_tokens is --max-new-tokens
    },
)
for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"foredraft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """The same tokens, sooner: speculative decoding for Hugging Face language models, kept exact."""


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)
