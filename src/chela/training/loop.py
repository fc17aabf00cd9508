"""The training loop: steps, logs, validations and saves, until it is done or stopped. Read it from the top."""

import math
import time
from contextlib import nullcontext
from typing import NoReturn

import torch

from chela.config import RunConfig
from chela.data import Task
from chela.models import build, save_model
from chela.models.files import read_weights
from chela.training import distributed, metrics
from chela.training.average import Average
from chela.training.board import Board
from chela.training.carry import Carried
from chela.training.checkpoint import restore, save_checkpoint
from chela.training.device import compute_type, peak_memory
from chela.training.folder import Found, RunFolder
from chela.training.guard import Guard, NonFinite, batch_norm_advice, check_weights, explain
from chela.training.interrupt import Interrupt
from chela.training.journal import Journal, surroundings
from chela.training.optim import make_optimizer, schedule, set_rate
from chela.training.pace import steps_in_all
from chela.training.progress import Display
from chela.training.step import Objective, compute_gradients
from chela.training.stream import Source, Stream
from chela.training.update import Learner, compile_blocks, make_update, uncompiled


class Trainer:
    """One run under way: model, optimiser, state, and the steps of training in the order they happen."""

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        folder: RunFolder,
        found: Found,
        device: torch.device,
        display: Display,
        weights: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.run, self.task, self.folder, self.device, self.display = run, task, folder, device, display
        self.dtype = compute_type(run.train.dtype, device)
        torch.manual_seed(run.seed)
        self.model = build(run.model).to(device)
        if weights:
            self.model.load_state_dict(weights)
        self.optimizer = make_optimizer(self.model, run.optim)
        self.model.backbone.checkpoint_blocks = run.train.checkpoint_blocks
        self.carried = Carried(self.model, run.train.batch_size, self.dtype) if run.train.carry_state else None
        self.average = Average(self.model, run.train.ema_decay) if run.train.ema_decay else None
        self.state = found.state
        if found.checkpoint:
            restore(folder.checkpoints / found.checkpoint, self.model, self.optimizer, self.carried, self.average)
        if device.type == "cuda" and run.train.compile:
            compile_blocks(self.model)
        self.sums = torch.tensor(self.state.sums, dtype=torch.float64, device=device)  # loss, hits, gradient norm
        self.guard = Guard(device)
        self.source = Source(task, run)
        watched = run.train.tensorboard and distributed.is_main()
        board = Board(folder.path / "tensorboard", found.state.step) if watched else None
        self.journal = Journal(folder.journal if distributed.is_main() else None, board)
        self.saved = self.state.step
        self.steps = steps_in_all(run.train, self.state.step, self.state.trained)  # of the whole run
        self.began = time.monotonic() - self.state.seconds
        self._announce()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def fit(self, interrupt: Interrupt) -> bool:
        """Take the steps that are left; False if a signal or a time limit stopped it, with a checkpoint saved."""
        run, state = self.run, self.state
        first, busy, counted = state.step, 0.0, state.tokens
        learner = Learner(
            self.model, self.optimizer, self.guard, self.sums, run, self.dtype, self.carried, self.average
        )
        with (
            interrupt,
            Stream(self.source, math.inf if run.train.minutes else run.train.steps, self.device) as stream,
            make_update(learner) as update,
            self.display.live(state.step),
        ):
            while state.step < self.steps:
                step, begun = state.step, time.monotonic()
                share = stream.take(step)
                stop = bool(interrupt.reason) and step > first  # each start takes a step at least
                clock = round(1e6 * state.trained) if distributed.is_main() else 0  # one for all processes
                counts = distributed.sum_over_ranks(torch.tensor([share.targets, share.tokens, stop, clock]))
                targets, tokens, stop, clock = counts.tolist()
                if stop:
                    self._stop_if_not_finite()  # waits for the device, as below
                    state.trained += time.monotonic() - begun
                    self._stop(interrupt.reason or "another process was stopped")
                    break

                self.steps = self.display.steps = steps_in_all(run.train, step, clock / 1e6)
                set_rate(self.optimizer, schedule(run.optim, step, self.steps))
                update(share, targets, step)

                state.step += 1
                state.steps, state.targets = state.steps + 1, state.targets + targets
                state.tokens += tokens
                logging, validating, saving = map(
                    self._due, (run.train.log_every, run.train.eval_every, run.train.save_every)
                )
                if logging or validating or saving:
                    self._stop_if_not_finite()
                spent = time.monotonic() - begun
                busy += spent
                state.trained += spent if step > first else 0.0
                if logging:
                    self._log((state.tokens - counted) / busy)
                    busy, counted = 0.0, state.tokens
                if validating:
                    self._validate()
                if saving:
                    self._save()
                self.display.step(state.step)
        return state.step == self.steps

    def test(self) -> dict[str, float]:
        """Evaluate the best weights on the test split, once, and close the journal."""
        assert self.state.best is not None, "the last step is always validated"
        _, weights = read_weights(self.folder.weights)
        self.model.load_state_dict(weights)
        result = self._evaluate("test")
        spent = self._spent()
        self.journal.write("test", step=self.state.best["step"], baselines=self.task.baselines, **result)
        self.journal.write("end", status="done", step=self.state.step, best=self.state.best, test=result, **spent)
        against = "".join(f"; {name} {100 * value:.1f} %" for name, value in self.task.baselines.items())
        self.display.say(
            f"done in {spent['seconds']:,.0f} s: test {metrics.text(result)} with the weights of step "
            f"{self.state.best['step']:,.0f}{against}; {self.folder.path}"
        )
        return result

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.steps

    def _log(self, tokens_per_s: float) -> None:
        """Write the means since the last line, and say so once if nothing has been learned for long."""
        state, step = self.state, self.state.step
        loss, hits, norm = self.sums.tolist()
        loss, accuracy = loss / max(state.targets, 1), hits / max(state.targets, 1)
        self.journal.write(
            "train",
            step=step,
            loss=loss,
            accuracy=accuracy,
            lr=self.run.optim.lr * schedule(self.run.optim, step - 1, self.steps),
            grad_norm=norm / state.steps,
            tokens_per_s=round(tokens_per_s, 1),
            tokens=state.tokens,
            trained_seconds=round(state.trained, 3),
        )
        self.display.train(step, loss, accuracy, tokens_per_s)
        after, chance = self.run.train.chance_after, self.task.chance_loss
        if step - state.steps < after <= step and loss >= 0.98 * chance:
            message = (
                f"after {step:,} steps the training loss {loss:.4f} is still at chance ({chance:.4f}); "
                "if it stays, try a longer optim.warmup, a lower or higher optim.lr, or another model.pooling"
            )
            self.journal.write("warning", step=step, message=message)
            self.display.say(f"warning: {message}")
        self.sums.zero_()
        state.steps = state.targets = 0

    def _validate(self) -> None:
        """Evaluate on the validation split; keep the weights if they are the best so far."""
        self._stop_if_not_finite()
        with self.average.in_the_model() if self.average is not None else nullcontext():
            result = self._evaluate("val")
            step, trained = self.state.step, round(self.state.trained, 3)
            self.journal.write("val", step=step, trained_seconds=trained, **self._spent(), **result)
            best = metrics.better(result, self.state.best, self.task.kind)
            if best:
                self.state.best = {"step": step, **result}
                check_weights(self.model)
                distributed.on_main(lambda: save_model(self.model, self.folder.weights))
        self.display.say(f"step {step:,}: validation {metrics.text(result)}{', the best so far' if best else ''}")

    def _save(self) -> None:
        """Write a checkpoint, never of numbers that are not finite."""
        self._stop_if_not_finite()
        check_weights(self.model)
        state, folder = self.state, self.folder
        state.sums, state.seconds = self.sums.tolist(), time.monotonic() - self.began
        self.journal.sync()
        distributed.on_main(
            lambda: save_checkpoint(
                folder.checkpoints,
                self.run,
                self.model,
                self.optimizer,
                state,
                folder.weights,
                self.carried,
                self.average,
            )
        )
        self.saved = state.step

    def _stop(self, reason: str) -> None:
        """Save before the end."""
        step = self.state.step
        if self.saved < step:
            self._save()
        best = self.state.best
        self.journal.write("end", status="stopped", step=step, reason=reason, best=best, **self._spent())
        self.display.say(
            f"stopped ({reason}) at step {step:,} of {self._in_all()}; the same command goes on from there"
        )

    def _evaluate(self, name: str) -> dict[str, float]:
        settings = self.run.train
        distributed.share_buffers(self.model)
        with uncompiled(self.model):  # the numbers of `chela eval`
            result = metrics.evaluate(
                self.model,
                getattr(self.task, name),
                batch_size=settings.eval_batch_size or settings.batch_size,
                device=self.device,
                dtype=self.dtype,
                kind=self.task.kind,
                examples=settings.eval_examples if name == "val" else 0,
            )
        if not math.isfinite(result["loss"]):
            advice = batch_norm_advice(self.run.model)
            self._fail(f"the {name} loss is not finite at step {self.state.step:,}{advice}")
        return result

    def _stop_if_not_finite(self) -> None:
        """Explain and end the run if a step since the last look was not finite."""
        step = self.guard.first()
        if step is None:
            return
        share = self.source.share(step)
        targets = int(distributed.sum_over_ranks(torch.tensor(share.targets)))

        def backward() -> torch.Tensor:
            objective, seed = Objective(self.model), self.run.seed
            place, dtype, carried = self.device, self.dtype, self.carried  # whose state is still that before the step
            return compute_gradients(objective, share.parts, targets, seed, step, place, dtype, carried)[0]

        with uncompiled(self.model):
            finding = explain(self.model, share.parts, backward)
        self._fail(f"the loss or its gradient became infinite or NaN at step {step + 1:,}, {finding}")

    def _fail(self, what: str) -> NoReturn:
        kept = f"the checkpoint of step {self.saved:,} stays" if self.saved else "no checkpoint had been saved"
        message = f"{what}; {kept}"
        self.journal.write("end", status="failed", step=self.state.step, message=message)
        raise NonFinite(message)

    def _spent(self) -> dict[str, float]:
        """Time since the run began and, on a GPU, the most memory that this process has held at once."""
        return {"seconds": round(time.monotonic() - self.began, 3), **peak_memory(self.device)}

    def _in_all(self) -> str:
        return f"about {self.steps:,}" if self.run.train.minutes else f"{self.steps:,}"

    def _announce(self) -> None:
        run, task, step = self.run, self.task, self.state.step
        parameters = sum(p.numel() for p in self.model.parameters())
        here = surroundings(self.device)
        self.journal.write(
            "start",
            step=step,
            preset=run.preset,
            seed=run.seed,
            task=task.name,
            parameters=parameters,
            dtype=str(self.dtype).removeprefix("torch."),
            processes=distributed.size(),
            chance_loss=task.chance_loss,
            note=task.note,
            **here,
        )
        self.display.say(
            f"{task.name}: {len(task.train):,} training, {len(task.val):,} validation, {len(task.test):,} test examples"
            + (f" ({task.note})" if task.note else "")
        )
        processes = f", {distributed.size()} processes" if distributed.size() > 1 else ""
        dtype = str(self.dtype).removeprefix("torch.")
        self.display.say(f"{parameters:,} parameters on {here['device']}, {dtype}{processes}")
        if step:
            self.display.say(f"going on from step {step:,} of {self._in_all()}")
        elif run.train.start_from:
            self.display.say(f"starting from the weights of {run.train.start_from}")
