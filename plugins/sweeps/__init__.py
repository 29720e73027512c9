"""The comparison at the end of a sweep: what jobs measured, as a table, as files and as plots.

``results`` reads what one job measured, ``rows`` a sweep's folder; ``table`` makes text of it, ``plots``
pictures; ``comparison`` writes all, for Hydra's sweeper (``configs/hydra/sweeper``) and for ``command``.
"""
