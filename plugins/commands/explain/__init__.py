"""``servelab explain``: the life of one request, told from the logs of its run.

Only what the records say is told, whatever the scheduler: where they are silent, the text says so.
"""
