"""Floor 6: the whole job on the bundled model, as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Seed, Steps


def demo(
    out: Annotated[Path, typer.Option(help="Directory for the report.")] = Path("demo-out"),
    calibration_images: Annotated[int, typer.Option(min=2, max=2000, help="To measure statistics on.")] = 2000,
    selection_images: Annotated[int, typer.Option(min=1, max=2000, help="To choose alpha on.")] = 2000,
    test_images: Annotated[int, typer.Option(min=1, max=2000, help="To compare with the base on.")] = 1000,
    steps: Steps = 30,
    seed: Seed = 0,
) -> None:
    """Run the whole job on the bundled robust network: a few minutes on a CPU, no download."""
    from .. import demo as demo_run
    from ..artifacts import require_place
    from .loading import console

    require_place(out, folder=True)
    demo_run.run(
        out,
        console(),
        calibration_images=calibration_images,
        selection_images=selection_images,
        test_images=test_images,
        steps=steps,
        seed=seed,
    )
