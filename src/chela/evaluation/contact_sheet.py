"""`chela data TASK --show`: images of a task with their labels, side by side."""

from collections.abc import Callable
from pathlib import Path

from chela.config import DataConfig
from chela.data.pathfinder import RULES, first_images
from chela.evaluation.curves import available

ROWS, COLUMNS = 4, 6
NAMES = ("not joined (0)", "joined (1)")
COLOURS = ("#a33b2f", "#2f6fa3")


def contact_sheet(config: DataConfig, folder: Path = Path(), progress: Callable[[str], None] | None = None) -> str:
    """Draw a task's first training images as `folder/TASK.png`.

    Args:
        config: task, data root, seed and number of distractors.
        folder: where the picture goes.
        progress: told what takes long.

    Returns:
        A line that names the picture.

    Raises:
        ValueError: another task, matplotlib is missing, or the picture cannot be written.
    """
    if config.task not in RULES:
        raise ValueError(f"--show draws {' and '.join(RULES)}, not {config.task}")
    if not available():
        raise ValueError("--show needs matplotlib: pip install 'chela[plot]'")
    from matplotlib.figure import Figure

    pixels, labels, note = first_images(config, ROWS * COLUMNS, progress)
    figure = Figure(figsize=(2 * COLUMNS, 2.25 * ROWS + 0.6), layout="constrained", facecolor="white")
    for axes in (grid := figure.subplots(ROWS, COLUMNS)).flat:
        axes.set_axis_off()
    for number, (axes, image, label) in enumerate(zip(grid.flat, pixels, labels.tolist(), strict=False)):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"{number}  {NAMES[label]}", fontsize=9, color=COLOURS[label])
    figure.suptitle(f"{config.task}, first training images, {note}", fontsize=10)
    path = folder / f"{config.task}.png"
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    return f"{path}: {min(len(labels), ROWS * COLUMNS)} images of {config.task} ({note})"
