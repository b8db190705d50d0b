"""Fine-tune ALBEF for visual entailment (Section 5): does a sentence follow from an image?"""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(
    __doc__, "configs/VE.yaml", "--checkpoint weights/ALBEF.pth --set optimizer.lr=1e-5"
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("ve", args)


if __name__ == "__main__":
    run_script(main)
