"""Training: one function, `train`, and what it is made of."""

from chela.training.guard import NonFinite as NonFinite
from chela.training.loop import Result as Result
from chela.training.loop import train as train
from chela.training.metrics import evaluate as evaluate
