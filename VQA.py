"""Fine-tune ALBEF for visual question answering (Section 5), and answer the test questions."""

from argparse import SUPPRESS

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(__doc__, "configs/VQA.yaml", "--checkpoint weights/ALBEF.pth --set k_test=64")
# accepted for released command lines, without effect: --checkpoint initializes the decoder
parser.add_argument("--text_decoder", help=SUPPRESS)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("vqa", args)


if __name__ == "__main__":
    run_script(main)
