"""Evaluates attributes of objects in boxes zero-shot (OVAD): which boxes are "red", which "made of
wood"?

--checkpoint is any model with the contrastive projections: pre-trained, or fine-tuned for retrieval
or grounding.
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Attributes.yaml", "--checkpoint refcoco.pth", trains=False)
flags.add_argument(
    "--prompts",
    choices=["the", "a", "none", "photo", "all"],
    default="the",
    help="the templates to ask with",
)
flags.add_argument(
    "--noun", default="", help="what the prompts call an object, such as object (default: nothing)"
)
flags.add_argument(
    "--score",
    choices=["mean", "max"],
    default="mean",
    help="over the synonyms and templates of an attribute",
)
if __name__ == "__main__":
    begin_script(flags)

import functools

from engine.task import run_task
from evaluation.attributes import evaluate


def main():
    args = flags.parse_args()
    how = {"prompts": args.prompts, "noun": args.noun, "score": args.score}
    run_task("attributes", args, None, functools.partial(evaluate, **how))


if __name__ == "__main__":
    run_script(main)
