"""Fine-tunes ALBEF for visual entailment (Section 5) and evaluates it: does the sentence follow
from the image?
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/VE.yaml", "--checkpoint ALBEF.pth --set optimizer.lr=1e-5")
if __name__ == "__main__":
    begin_script(flags)

from engine.task import run_task
from evaluation.classification import evaluate, step


def main():
    run_task("ve", flags.parse_args(), step, evaluate, "acc")


if __name__ == "__main__":
    run_script(main)
