"""Fine-tune ALBEF for NLVR2 (Section 5): is a sentence true of two images?

--checkpoint names a model that text assignment has trained (Pretrain_nlvr.py). It may also name a
model of pre-training, to leave out text assignment ("w/o TA" in Table 7).
"""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(__doc__, "configs/NLVR.yaml", "--checkpoint pretrain_model_nlvr.pth")


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("nlvr", args)


if __name__ == "__main__":
    run_script(main)
