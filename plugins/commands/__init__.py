"""Commands of ``servelab`` beside a run: each a module with ``main(argv)``."""
