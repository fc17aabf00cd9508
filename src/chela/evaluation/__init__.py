"""What happens after training: evaluation, generation, reports, benchmarks, and a look at the machine."""

from chela.evaluation.evaluate import Evaluated as Evaluated
from chela.evaluation.evaluate import evaluate_run as evaluate_run
from chela.evaluation.generate import generate as generate
from chela.evaluation.report import write_report as write_report
