"""torchrun as scripts/slurm_pretrain.sh starts it on each node; the arguments are torchrun's.

The exit status is the run's: 2 after an input error, 143 after SIGTERM, where torchrun's own is
always 1. And the nodes find each other by the names that Slurm has for them, since what they call
themselves need not be known to the others.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_status(error):
    """Of the process that failed first, but 2 if any had an input error: the others have only lost
    that one.
    """
    if any(failure.exitcode == 2 for failure in error.failures.values()):
        return 2
    _, first = error.get_first_failure()
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


try:
    main([f"--local_addr={os.environ['SLURMD_NODENAME']}", *sys.argv[1:]])
except SignalException as error:
    sys.exit(128 + error.sigval)
except ChildFailedError as error:
    sys.exit(exit_status(error))
