"""`planner models` and `planner gpus`: what the catalogues hold, with sources."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from planner.cli.reply import Reply
from planner.errors import SetupError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

__all__ = ["GPUS_HELP", "MODELS_HELP", "gpus", "gpus_flags", "models", "models_flags"]

MODELS_HELP = "models of the catalogue, with their parameters and sources"
GPUS_HELP = "GPUs of the catalogue, with their memory and sources"


def models_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--name", metavar="TEXT", help="only models whose id contains this")


def gpus_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("--name", metavar="TEXT", help="only GPUs whose name contains this")


def models(args: argparse.Namespace) -> Reply:
    """The catalogue's models, in its order."""
    from planner import catalog

    wanted = getattr(args, "name", "")
    found = [_model(name) for name in catalog.models() if wanted.casefold() in name.casefold()]
    if not found:
        raise SetupError(f"no model's id contains {wanted!r}; {nearest(wanted, _short(catalog.models()))}")

    def show(console: Console) -> None:
        from planner.cli.tables import show_models

        show_models(console, found)

    return Reply(answer={"models": found}, show=show)


def gpus(args: argparse.Namespace) -> Reply:
    """The catalogue's GPUs, in its order."""
    from planner.catalog.gpus import gpus as known

    wanted = getattr(args, "name", "")
    found = [
        {
            "name": gpu.name,
            "driver_name": gpu.driver_name,
            "total_bytes": gpu.total_bytes,
            "memory_kind": gpu.memory_kind,
            "nominal": gpu.nominal,
            "capability": list(gpu.capability) if gpu.capability else None,
            "source": gpu.source,
        }
        for gpu in known()
        if wanted.casefold() in f"{gpu.name} {gpu.driver_name}".casefold()
    ]
    if not found:
        near = nearest(wanted, (gpu.name for gpu in known()))
        raise SetupError(f"no GPU's name contains {wanted!r}; {near}")

    def show(console: Console) -> None:
        from planner.cli.tables import show_gpus

        show_gpus(console, found)

    return Reply(answer={"gpus": found}, show=show)


def _model(name: str) -> dict[str, Any]:
    from planner import catalog

    model = catalog.model(name)
    return {
        "id": model.id,
        "task": model.task,
        "family": model.architecture.family if model.architecture else model.config.get("model_type"),
        "parameters": model.parameters,
        "max_positions": model.max_positions,
        "source": model.source,
        "evidence": list(catalog.catalogue_entry(name).get("evidence", [])),
    }


def _short(names: Iterable[str]) -> set[str]:
    return {name.rpartition("/")[2] for name in names}
