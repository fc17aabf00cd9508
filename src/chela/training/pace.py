"""How many steps a run takes: as many as were asked for, or as many as its minutes hold."""

from chela.config import TrainConfig


def steps_in_all(config: TrainConfig, step: int, trained: float) -> int:
    """Steps of the whole run as far as is known at a step; with `minutes`, those that come out at the pace so far.

    The end of the schedule moves with it, so that the rate has fallen to its end when the time is up, whatever a step
    takes. A step within which the time runs out is the last.

    Args:
        config: `steps`, which with `minutes` is a guess for as long as nothing has been measured.
        step: number of the step that comes next, from 0.
        trained: seconds spent on the steps before it, as `State.trained` counts them.
    """
    if not config.minutes:
        return config.steps
    if not trained:
        return max(step + 2, config.steps)
    return max(step + 1, round(step * 60 * config.minutes / trained))
