"""Where a user's files lie."""

from collections.abc import Callable
from pathlib import Path


def find_folder(root: Path, names: tuple[str, ...], complete: Callable[[Path], bool], task: str, wanted: str) -> Path:
    """The first of `root/name` and `root` itself that holds a task's files.

    Args:
        root: data root; `~` is expanded.
        names: subfolders tried, in order.
        complete: whether a folder holds the files.
        task: name of the task.
        wanted: the files and where users get them.

    Raises:
        ValueError: none does; says which files are wanted, where they are to be had and where to put them.
    """
    root = root.expanduser()
    for folder in (*(root / name for name in names), root):
        if folder.is_dir() and complete(folder):
            return folder
    raise ValueError(
        f"no data for {task}: put {wanted} into {root / names[0]}, or name the folder that has them with --data.root"
    )
