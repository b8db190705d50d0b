"""Pre-trains ALBEF on image-caption pairs (Section 3) and, if the configuration names a test_file,
evaluates zero-shot.
"""

from configs.flags import task_flags
from utils import begin_script, run_script

flags = task_flags(__doc__, "configs/Pretrain.yaml", "--set batch_size=32 accumulate=2")
flags.add_argument(
    "--vision_encoder",
    metavar="VIT",
    help="ViT weights: timm name, folder, .pth, .safetensors, or random",
)
if __name__ == "__main__":
    begin_script(flags)

from engine.task import run_task
from evaluation.retrieval import evaluate
from models.weights import load_encoders


def step(model, batch, alpha, update_momentum):
    """Return the losses of a batch by name."""
    return model(batch, alpha=alpha, update_momentum=update_momentum)


def main():
    run_task("pretrain", flags.parse_args(), step, evaluate, initialize=load_encoders)


if __name__ == "__main__":
    run_script(main)
