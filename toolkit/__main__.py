"""`python -m toolkit COMMAND`: the same as `toolkit COMMAND`, in the form that launchers take."""

from toolkit.cli.main import main

main()
