"""Fine-tunes ALBEF for image-text retrieval (Section 5) and evaluates it:

ITC ranking, then ITM re-ranking.
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(
    __doc__, "configs/Retrieval_flickr.yaml", "--checkpoint ALBEF.pth --k_test 16 128"
)
flags.add_argument(
    "--k_test",
    nargs="+",
    metavar="K",
    help="numbers of candidates to re-rank, each gives a row of the table",
)
if __name__ == "__main__":
    begin_script(flags)

import functools

from engine.task import run_task
from evaluation.retrieval import evaluate
from utils import InputError


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(batch, alpha=alpha, update_momentum=update_momentum)


def candidates(values):
    """Return --k_test as whole numbers, None if the flag is not given. Raises InputError."""
    try:
        ks = values and [int(value) for value in values]
    except ValueError:
        ks = [0]
    if ks and min(ks) < 1:
        raise InputError(
            f"--k_test {' '.join(values)}: give whole numbers from 1, the candidates that ITM ranks again"
        )
    return ks


def main():
    args = flags.parse_args()
    run_task(
        "retrieval", args, step, functools.partial(evaluate, ks=candidates(args.k_test)), "r_mean"
    )


if __name__ == "__main__":
    run_script(main)
