"""Everything a run is made of: one folder per family, whose ``__init__`` is the table of its techniques."""
