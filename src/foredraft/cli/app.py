"""The commands by name."""

from typing import Annotated

import typer

from foredraft import __version__
from foredraft.cli.chat import chat
from foredraft.cli.convert import convert
from foredraft.cli.generate import generate
from foredraft.cli.launch import launch, list_models, terminate
from foredraft.cli.serve import serve
from foredraft.cli.tune import tune

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "tune": tune,
    "serve": serve,
    "launch": launch,
    "list": list_models,
    "terminate": terminate,
}

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
    app.command(name)(command)


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
