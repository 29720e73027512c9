"""Hydra's primary configuration: YAML only. A package, because Hydra looks for ``__init__.py``."""
