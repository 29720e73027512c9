"""ServeLab's mechanism: hooks, composition, the event-driven engine, metrics. Names no technique."""

__version__ = "0.1.0"
