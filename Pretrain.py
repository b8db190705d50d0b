"""Pre-train ALBEF on image-caption pairs (Section 3), then evaluate zero-shot retrieval."""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(__doc__, "configs/Pretrain.yaml", "--set batch_size=32 accumulate=2")
parser.add_argument(
    "--vision_encoder",
    metavar="VIT",
    help="ViT weights: timm name, folder, .pth, .safetensors, or random (default: the key"
    " vision_encoder)",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("pretrain", args)


if __name__ == "__main__":
    run_script(main)
