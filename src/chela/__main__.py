"""`python -m chela`, and what `torchrun -m chela train ...` starts."""

import sys

from chela.cli import main

sys.exit(main())
