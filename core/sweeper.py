"""Lets the configuration name a sweeper of any package (``configs/hydra/sweeper``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig


def install() -> None:
    """Tell Hydra; idempotent.

    Hydra itself takes sweepers only from the package ``hydra_plugins``, which every program that uses Hydra
    would load. This concerns our own programs alone.
    """
    plugins = Plugins.instance()
    if "instantiate_sweeper" not in vars(plugins):
        vars(plugins)["instantiate_sweeper"] = partial(_instantiate, plugins.instantiate_sweeper)


def _instantiate(usual: Callable[..., Sweeper], *, config: DictConfig, **given: Any) -> Sweeper:
    settings = config.hydra.sweeper
    if settings is None or Plugins.is_in_toplevel_plugins_module(str(settings.get("_target_"))):
        return usual(config=config, **given)
    sweeper: Sweeper = instantiate(settings, _convert_="all")
    sweeper.setup(config=config, **given)
    return sweeper
