"""The command line. Importing it imports neither torch nor transformers: `foredraft --help` answers at once."""


def main() -> None:
    """The `foredraft` command."""
    import signal

    from foredraft.cli.console import leave_at_once

    signal.signal(signal.SIGINT, leave_at_once)
    from foredraft.cli.app import app

    try:
        app(prog_name="foredraft")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # libraries are taken down; any handler would be reset to death
