"""Fine-tune ALBEF for query-ad relevance: is an ad (image and words) relevant to a query?"""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(__doc__, "configs/Relevance.yaml", "--checkpoint weights/ALBEF.pth")
parser.add_argument(
    "--alone",
    action="store_true",
    help="also evaluate each ad with the image of another ad, and with the words of another ad",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("relevance", args, alone=args.alone)


if __name__ == "__main__":
    run_script(main)
