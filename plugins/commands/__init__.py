"""Subcommands of ``servelab``: a command is a module with ``main(argv)``."""
