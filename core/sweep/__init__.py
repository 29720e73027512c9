"""Sweeps: Hydra's multirun with jobs that cannot harm one another, an end that tells all, and a resume.

``sweeper`` numbers the jobs and launches them, ``job`` runs one in a process of its own, ``folder`` is what
is on disk: one folder per job with ``job.json`` (how it stands), ``error.txt`` (why it failed) and
``report.txt`` (what it printed). The comparison at the end is not the core's: ``configs/config.yaml`` names
the function that draws it.
"""
