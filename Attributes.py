"""Evaluate attributes of objects in boxes zero-shot (OVAD), such as "red" or "made of wood".

--checkpoint is a model of pre-training, retrieval or grounding.
"""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(
    __doc__, "configs/Attributes.yaml", "--checkpoint weights/refcoco.pth", trains=False
)
parser.add_argument(
    "--prompts",
    choices=["the", "a", "none", "photo", "all"],
    default="the",
    help="templates of the prompts",
)
parser.add_argument(
    "--noun", default="", help="noun for every object in the prompts, such as object"
)
parser.add_argument(
    "--score",
    choices=["mean", "max"],
    default="mean",
    help="score of an attribute over its synonyms and templates",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("attributes", args, prompts=args.prompts, noun=args.noun, score=args.score)


if __name__ == "__main__":
    run_script(main)
