"""``servelab compare``: what runs were told, and what came out, side by side."""
