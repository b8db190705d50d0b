"""Start torchrun on a node, as scripts/slurm_pretrain.sh does; the arguments are torchrun's.

The exit code is the run's, 2 after an input error and 143 after SIGTERM. The exit code of torchrun
itself is always 1. Nodes find each other by Slurm's names: a node's own hostname need not be known
to other nodes.
"""

import os
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def exit_code(error: ChildFailedError) -> int:
    """Return 2 if a process had an input error, else the exit code of the first failed process.

    The other processes fail only because they lose that one.
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
    sys.exit(exit_code(error))
