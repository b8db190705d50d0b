"""Fine-tune ALBEF for image-text retrieval (Section 5): ITC ranking, then ITM re-ranking."""

from configs.cli import at_least, task_parser
from engine.launch import run_script

parser = task_parser(
    __doc__, "configs/Retrieval_flickr.yaml", "--checkpoint weights/ALBEF.pth --k_test 16 128"
)
parser.add_argument(
    "--k_test",
    nargs="+",
    type=at_least(1),
    metavar="K",
    help="numbers of candidates to re-rank; each adds a row to the table (default: the key k_test)",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("retrieval", args, ks=args.k_test)


if __name__ == "__main__":
    run_script(main)
