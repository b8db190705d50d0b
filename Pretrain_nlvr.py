"""Pre-train ALBEF for NLVR2 by text assignment (Section 5).

The model learns whether a text describes the first image, the second image, or neither.
"""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(__doc__, "configs/NLVR_pretrain.yaml", "--checkpoint weights/ALBEF.pth")


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("nlvr_pretrain", args)


if __name__ == "__main__":
    run_script(main)
