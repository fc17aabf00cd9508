"""Training: one function, `train`, and what it is made of."""

from chela.training.guard import NonFinite as NonFinite
from chela.training.metrics import evaluate as evaluate
from chela.training.run import Result as Result
from chela.training.run import train as train
