"""One update of the weights: computed kernel by kernel, or replayed as a CUDA graph.

On a GPU a small model's kernels are done before the next one is launched. There the blocks are compiled, which fuses
what lies between the ops, and the whole update is recorded once for each shape of batch and replayed: the same kernels
on the same memory, launched at once.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from chela.config import RunConfig
from chela.data import Batch
from chela.training import distributed
from chela.training.average import Average
from chela.training.carry import Carried
from chela.training.guard import Guard
from chela.training.precompile import precompile
from chela.training.step import Objective, add_gradients, clip_gradients, compute_gradients, dropout_seed
from chela.training.stream import Share

Update = Callable[[Share, int, int], None]
"""Takes a share, the number of targets in all shares, and the step: updates the weights, adds to the sums."""


@dataclass(frozen=True)
class Learner:
    """What an update works on."""

    model: nn.Module
    """On its device."""
    optimizer: torch.optim.Optimizer
    """Of its parameters."""
    guard: Guard
    """Told of every step."""
    sums: Tensor
    """Loss, hits and gradient norm so far, float64 [3], on the device; each update adds its own."""
    run: RunConfig
    """Every setting."""
    dtype: torch.dtype
    """Compute type."""
    carried: Carried | None = None
    """The rows' state, where it is carried from step to step."""
    average: Average | None = None
    """Of the weights, where it is asked for."""

    def objective(self) -> Objective:
        """The model with the loss it learns by."""
        return Objective(self.model, self.run.train.label_smoothing)

    def apply(self, scores: Tensor, step: int | Tensor) -> None:
        """Clip, update (unless a step so far was not finite) and forget the gradients; add scores and norm to the sums.

        Args:
            scores: loss and hits over all processes, float64 [2].
            step: number of the step; a float64 tensor inside a CUDA graph.
        """
        loss, hits = scores
        norm = clip_gradients(self.model, self.run.optim.clip)
        bad = self.guard.watch(step, loss, norm)
        self.optimizer.found_inf = bad  # pyrefly: ignore
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sums.add_(torch.stack([loss, hits, norm.double()]))
        if self.carried is not None:
            self.carried.keep(bad)
        if self.average is not None:
            self.average.follow(step)

    def changed(self) -> list[Tensor]:
        """Whatever an update changes."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        carried = [] if self.carried is None else self.carried.state.tensors()
        average = [] if self.average is None else self.average.tensors.values()
        own = [*self.model.parameters(), *self.model.buffers(), self.sums, self.guard.bad_step]
        return [*own, *moments, *carried, *average]


@contextmanager
def make_update(learner: Learner) -> Iterator[Update]:
    """The update that fits the device and the settings.

    A CUDA graph holds the update of one process that takes its batch in one piece; elsewhere kernels are launched one
    by one. So they are where blocks are computed again with dropout: a graph cannot set back the generator for it.
    """
    run = learner.run
    whole = distributed.size() == 1 and run.train.accumulate == 1
    drawn_again = run.train.checkpoint_blocks and (run.model.dropout > 0 or run.model.tap_dropout > 0)
    if learner.sums.is_cuda and run.train.compile and whole and not drawn_again:
        yield GraphedUpdate(learner)
        return
    update = PlainUpdate(learner)
    try:
        yield update
    finally:
        update.release()


class PlainUpdate:
    """An update launched kernel by kernel, on any device and any number of processes."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.parallel: nn.Module | None = distributed.wrap(learner.objective(), learner.sums.device)

    def __call__(self, share: Share, targets: int, step: int) -> None:
        """Update the weights with this process's share."""
        assert self.parallel is not None
        learner = self.learner
        seed, device = learner.run.seed, learner.sums.device
        scores = compute_gradients(
            self.parallel, share.parts, targets, seed, step, device, learner.dtype, learner.carried
        )
        learner.apply(distributed.sum_over_ranks(scores), step)

    def release(self) -> None:
        """Let go of DDP, which holds on to the process group, also where a traceback holds on to this update."""
        self.parallel = None


@dataclass(frozen=True)
class Recording:
    """An update as a graph, and the memory it reads its batch from."""

    graph: torch.cuda.CUDAGraph
    """The kernels of one update."""
    batch: Batch
    """On the device, overwritten before each replay."""


class GraphedUpdate:
    """An update that is recorded when a shape of batch is first met, and replayed from then on."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.objective = learner, learner.objective()
        device = learner.sums.device
        self.step = torch.zeros((), dtype=torch.float64, device=device)
        self.weight = torch.zeros((), device=device)  # of each target in the loss
        self.recordings: dict[tuple[torch.Size | None, ...], Recording] = {}
        self.memory = torch.cuda.graph_pool_handle()  # one for all: only one recording runs at a time

    def __call__(self, share: Share, targets: int, step: int) -> None:
        """Update the weights with a share of one part."""
        (part,) = share.parts
        shapes = tuple(None if x is None else x.shape for x in _tensors(part))
        recording = self.recordings.get(shapes)
        if recording is None:
            recording = self.recordings[shapes] = self._record(part)
        for place, value in zip(_tensors(recording.batch), _tensors(part), strict=True):
            if place is not None and value is not None:
                place.copy_(value, non_blocking=True)
        self.step.fill_(step)
        self.weight.fill_(1 / max(targets, 1))
        torch.manual_seed(dropout_seed(self.learner.run.seed, step, 0, 0))  # a replay reads the generator's seed anew
        recording.graph.replay()

    def _update(self, batch: Batch) -> None:
        learner = self.learner
        learner.apply(add_gradients(self.objective, batch, self.weight, learner.dtype, learner.carried), self.step)

    def _record(self, part: Batch) -> Recording:
        """Take a step that compiles whatever it meets, undo it, and record the next."""
        batch = part.to(self.learner.sums.device)
        if not self.recordings:
            precompile(self.learner.run, batch, self.learner.dtype)
        before = {id(tensor): tensor.detach().clone() for tensor in self.learner.changed()}
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's advice, to those who work on it
            self._update(batch)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.no_grad():
            for tensor in self.learner.changed():  # AdamW's averages are new and start at 0
                tensor.copy_(before.get(id(tensor), torch.zeros_like(tensor)))
        del before
        gc.collect()  # what cycles keep of the step's graph would tie parameters to its stream
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            self._update(batch)
        return Recording(graph, batch)


def compile_blocks(model: nn.Module) -> None:
    """Compile the model's blocks, one program for all of them and for every length, and what follows them.

    Weights and their names stay as they are. Kernels of flash-linear-attention cannot be traced and stay uncompiled.
    A model compiled before is compiled again at its next call.
    """
    if model.backbone.config.mixer == "gla":  # pyrefly: ignore
        return
    # Programs of all models in a process count against one limit a function, and the ninth would be refused.
    torch.compiler.reset()
    # Launched one by one, a last batch norm and a mean over positions took a tenth of a step of the listops preset.
    after = [model.backbone.last_norm, getattr(model, "pooling", None)]  # pyrefly: ignore
    for part in [*model.backbone.blocks, *after]:  # pyrefly: ignore
        if part is not None:
            part.compile(fullgraph=True, dynamic=True)


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Run a model's compiled blocks as they are written, for a while: for evaluation, or to look inside."""
    if any(block._compiled_call_impl is not None for block in model.backbone.blocks):  # pyrefly: ignore
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _tensors(batch: Batch) -> list[Tensor | None]:
    return [getattr(batch, field.name) for field in fields(batch)]
