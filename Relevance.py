"""Fine-tunes ALBEF for query-ad relevance and evaluates it: is an ad of an image and words relevant
to a query?
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Relevance.yaml", "--checkpoint ALBEF.pth")
flags.add_argument(
    "--alone",
    action="store_true",
    help="test also with the images and the words of other ads: what text and image alone reach",
)
if __name__ == "__main__":
    begin_script(flags)

import functools

from engine.task import run_task
from evaluation.classification import step
from evaluation.relevance import evaluate


def main():
    args = flags.parse_args()
    run_task("relevance", args, step, functools.partial(evaluate, alone=args.alone), "auc")


if __name__ == "__main__":
    run_script(main)
