"""Fine-tunes ALBEF for visual entailment (Section 5) and evaluates it: does the sentence follow from the image?"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/VE.yaml", "--checkpoint ALBEF.pth --set optimizer.lr=1e-5")
if __name__ == "__main__":
    begin_script(flags)

from evaluation.classification import evaluate, show, step
from dataset.ve import LABELS
from engine.task import run_task


def main():
    args = flags.parse_args()
    run_task("ve", args, step, evaluate, "acc", show("visual entailment", len(LABELS)))


if __name__ == "__main__":
    run_script(main)
