"""Entry of `python -m toolkit.train RECIPE`: the command `toolkit train`, in the form that launchers accept."""

from __future__ import annotations

import typer

from toolkit.cli.train import train
from toolkit.startup import prepare_process


def main() -> None:
    """Run `python -m toolkit.train`."""
    prepare_process()
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(train)
    app()


if __name__ == "__main__":
    main()
