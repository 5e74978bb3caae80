"""Entry point of `python -m toolkit COMMAND`: the same as `toolkit COMMAND`, in the form that launchers accept."""

from toolkit.cli.main import main

main()
