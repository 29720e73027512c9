"""``servelab data``: published traces, fetched from their publishers."""
