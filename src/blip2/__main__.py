"""`python -m blip2`, also what `torchrun -m blip2 train ...` starts."""

import sys

from blip2.cli.main import main

sys.exit(main())
