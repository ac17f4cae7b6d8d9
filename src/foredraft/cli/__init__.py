"""The command line. Importing it imports neither torch nor transformers: `foredraft --help` answers at once."""


def main() -> None:
    """The `foredraft` command."""
    from foredraft.cli.app import app

    app(prog_name="foredraft")
