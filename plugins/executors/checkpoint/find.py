"""The ``model`` section -> files on this machine, and the shape that they state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from servelab.core.config import MODEL_KINDS, SHAPE, ModelConfig
from servelab.core.errors import ConfigError
from servelab.core.user_cache import stated_path
from servelab.plugins.executors.checkpoint import folder as hf
from servelab.plugins.executors.checkpoint import hub, wheel
from servelab.plugins.executors.checkpoint.architectures import checked, shape
from servelab.plugins.executors.checkpoint.checkpoint import Checkpoint
from servelab.plugins.executors.checkpoint.convert import PROVENANCE
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.gguf_config import config_of, quantization_of
from servelab.plugins.executors.checkpoint.gguf_file import MAGIC, read_gguf


def find(model: ModelConfig) -> Checkpoint:
    """The files of a model, downloaded first where that is its source, each checked whole.

    Raises:
        ConfigError: settings are wrong, or state another shape than the files.
        ModelError: files are missing, damaged, cannot be downloaded, or hold what we do not support.
    """
    checkpoint = _found(model)
    _agrees(model, checkpoint.config, checkpoint.provenance)
    return checkpoint


def _found(model: ModelConfig) -> Checkpoint:
    if model.source == "path":
        return _local(_path(model), {"source": "path", "path": str(_path(model))})
    if model.source == "hub":
        where = hub.snapshot(model)
        return _local(where, {"source": "hub", "repo": model.repo, "commit": where.name})
    if model.source == "wheel":
        return _of_wheel(model)
    raise _none(model)


def describe(model: ModelConfig) -> dict[str, Any]:
    """The shape fields that the ``model`` section leaves open, as the files state them.

    Of the hub and of a folder only config.json is looked at.

    Raises:
        ConfigError: settings are wrong.
        ModelError: as ``find``.
    """
    folder = None
    if model.source == "hub":
        folder = hub.snapshot(model, hub.CONFIG)
    elif model.source == "path":
        folder = _path(model)
    if folder is not None and folder.is_dir():
        config = checked(hf.read_config(folder), str(folder / "config.json"))
    else:
        config = dict(_found(model).config)
    return {name: value for name, value in shape(config).items() if getattr(model, name) is None}


def _local(path: Path, provenance: dict[str, Any]) -> Checkpoint:
    if path.is_file():
        gguf = read_gguf(path)
        return Checkpoint(
            config=checked(config_of(gguf), str(path)),
            provenance={**provenance, "quantization": f"{quantization_of(gguf)} (dequantized)"},
            files=(path,),
            weights={},
            gguf=gguf,
        )
    config = checked(hf.read_config(path), str(path / "config.json"))
    weights = hf.weights(path)
    files = tuple(sorted(set(weights.values())))
    return Checkpoint(
        config=config, provenance={"quantization": "none", **provenance}, files=files, weights=weights
    )


def _of_wheel(model: ModelConfig) -> Checkpoint:
    where = wheel.folder_of(model)
    try:
        provenance = hf.read_json(where / PROVENANCE)
        made = {**provenance, "quantization": f"{provenance.get('quantization')} (dequantized)"}
        return _local(where, {**made, "path": str(where)})
    except ModelError as exc:
        raise ModelError(
            exc.what, where=exc.where, why=exc.why, do=f"delete {where}: it is made again from the wheel"
        ) from exc


def _path(model: ModelConfig) -> Path:
    path = stated_path(model.path or "")
    if path.is_dir():
        return path
    if not path.exists():
        raise ModelError(
            f"there is no {path}",
            where="model.path",
            why=f"the path is taken from {Path.cwd()}"
            if not path.is_absolute()
            else "no such file or folder",
            do=f"make it: {model.made_by}"
            if model.made_by
            else "name a folder with config.json and *.safetensors, or a GGUF file; or use model=hub",
        )
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if path.suffix == ".gguf" or start == MAGIC:
        return path
    raise ModelError(
        f"{path.name} is neither a folder nor a GGUF file",
        where="model.path",
        why="pickles (*.bin, *.pt, *.pth) can run code and are not read"
        if any(path.match(pattern) for pattern in hf.PICKLES)
        else f"it starts with {start!r}",
        do="name the folder that holds it, with config.json and *.safetensors, or a GGUF file",
    )


def _agrees(model: ModelConfig, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Raise where the settings state another shape than the files; a shorter ``max_position`` is a limit."""
    files = {**MODEL_KINDS, **shape(config)}
    # nothing is read into a shape that is stated: windows and experts that it leaves out are none
    stated = {} if model.unstated() else dict(MODEL_KINDS)
    stated |= model.model_dump(include={*SHAPE, *MODEL_KINDS}, exclude_none=True)
    wrong = [
        f"model.{name} is {stated[name]}, the files say {files[name]}"
        for name in stated
        if (stated[name] > files[name] if name == "max_position" else stated[name] != files[name])
    ]
    if wrong:
        raise ConfigError(
            f"the settings of model {model.name!r} are not those of its files",
            where=str(provenance.get("path") or provenance.get("repo")),
            why="; ".join(wrong),
            do="leave these fields out (null): they are read from the files",
        )


def _none(model: ModelConfig) -> ConfigError:
    return ConfigError(
        f"model {model.name!r} has no weights",
        where="model.source",
        why="it is a shape only (source: none)",
        do="choose one with weights: model=smollm2_135m, model=hub model.repo=OWNER/NAME, or model=local "
        "model.path=FOLDER_OR_GGUF",
    )
