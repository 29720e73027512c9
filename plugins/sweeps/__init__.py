"""The comparison at the end of a sweep: what jobs measured, as a table, as files and as plots.

``rows`` reads a sweep's folder, ``table`` makes text of it, ``plots`` pictures, ``comparison`` writes all.
"""
