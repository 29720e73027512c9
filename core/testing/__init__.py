"""For tests only, never imported by a run: toy parts and a hand-driven engine (``fakes``)."""
