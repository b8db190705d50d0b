"""Evaluate zero-shot attribute recognition (OVAD): which attributes does the object in a box have?

--checkpoint names a model of pre-training, retrieval or grounding.
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
    help="templates of the prompts: 'the' gives prompts such as \"the red\"; 'all' joins the"
    " templates of 'the', 'a' and 'none'",
)
parser.add_argument(
    "--noun",
    default="",
    help="noun of the prompts: 'object' gives prompts such as \"the red object\"",
)
parser.add_argument(
    "--score",
    choices=["mean", "max"],
    default="mean",
    help="whether the score of an attribute is the mean or the largest similarity of its prompts",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("attributes", args, prompts=args.prompts, noun=args.noun, score=args.score)


if __name__ == "__main__":
    run_script(main)
