"""``servelab new``: a package of one's own, with a plugin that works."""
