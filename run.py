"""Run servelab from a checkout, installed or not: ``python run.py [overrides]``."""

import sys
from pathlib import Path

# The script's own folder would make core/ and plugins/ importable under a second name, so src/ takes its
# place; being first, it also wins over an installed servelab. Workers of a sweep import this file again.
_root = Path(__file__).resolve().parent
sys.path[:] = [str(_root / "src"), *(p for p in sys.path if p != str(_root))]

from servelab.core.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
