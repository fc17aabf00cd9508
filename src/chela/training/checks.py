"""Does this model fit this task, and this batch these processes? Asked before anything is written."""

from chela.config import RunConfig
from chela.data import Task
from chela.training import distributed
from chela.training.board import check_board


def check_run(run: RunConfig, task: Task) -> None:
    """Refuse settings that do not fit the task or the number of processes.

    Raises:
        ValueError: names the key and the value it must have.
    """
    model = run.model
    if model.merged:
        raise ValueError("model.merged is true: a folded model is for inference, train with --model.no-merged")
    wanted = {"kind": task.kind, "inputs": task.inputs}
    wanted |= {"vocab": task.vocab} if task.inputs == "tokens" else {"channels": task.channels}
    wanted |= {} if task.kind == "causal-lm" else {"classes": task.classes}
    for key, value in wanted.items():
        if getattr(model, key) != value:
            raise ValueError(
                f"model.{key} is {getattr(model, key)}, but task {task.name} needs {value}: set --model.{key} {value}"
            )
    if task.kind != "causal-lm" and 0 < model.kernel_length < task.max_length:
        raise ValueError(
            f"sequences of up to {task.max_length} tokens are longer than model.kernel_length {model.kernel_length}; "
            f"set --model.kernel-length {task.max_length} or cut with --data.max-length {model.kernel_length}"
        )
    if run.train.length_warmup and task.kind != "causal-lm":
        raise ValueError(
            f"train.length_warmup cuts sequences in pieces, and task {task.name} needs them whole: "
            "set --train.length-warmup 0"
        )
    if run.train.carry_state:
        _check_carried(run, task)
    if run.train.tensorboard:
        check_board()
    shares = distributed.size() * run.train.accumulate
    if run.train.batch_size % shares:
        raise ValueError(
            f"train.batch_size {run.train.batch_size} cannot be cut into {distributed.size()} processes times "
            f"train.accumulate {run.train.accumulate}: it must be a multiple of {shares}"
        )
    for name, split in (("training", task.train), ("validation", task.val), ("test", task.test)):
        if not len(split):
            raise ValueError(f"task {task.name} has no {name} examples")


def _check_carried(run: RunConfig, task: Task) -> None:
    if run.model.mixer != "chela":
        raise ValueError(
            f"train.carry_state hands on a state of fixed size, and model.mixer {run.model.mixer} has none: "
            "set --train.no-carry-state"
        )
    if run.model.branch_norm:
        raise ValueError(
            "train.carry_state hands a state on, which branch norm cannot while it trains: set --model.no-branch-norm "
            "or --train.no-carry-state"
        )
    if not getattr(task.train, "consecutive", False):
        raise ValueError(
            f"train.carry_state reads on from window to window, but the examples of task {task.name} do not follow "
            "each other: set --train.no-carry-state"
        )
    if distributed.size() > 1:
        raise ValueError("train.carry_state runs in one process: start it without torchrun, or --train.no-carry-state")
    if len(task.train) < run.train.batch_size:
        raise ValueError(
            f"train.carry_state gives each of {run.train.batch_size} rows a stretch of its own, but task "
            f"{task.name} has {len(task.train)} windows: set a smaller --train.batch-size or --data.max-length"
        )
