"""The subcommands of `toolkit`. Each imports what it needs only when called."""
