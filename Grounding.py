"""Fine-tune ALBEF on image-text pairs, and ground expressions by Grad-CAM (Section 5)."""

from configs.cli import task_parser
from engine.launch import run_script

parser = task_parser(
    __doc__, "configs/Grounding.yaml", "--checkpoint weights/refcoco.pth --evaluate"
)
parser.add_argument(
    "--gradcam_mode",
    choices=["itm", "itc"],
    default="itm",
    help="attention that the heat maps show. itm: cross-attention of the multimodal encoder; itc:"
    " self-attention of the ViT",
)
parser.add_argument(
    "--block_num",
    type=int,
    help="number of the layer to explain, from 0. itm: of a multimodal layer of BERT, 6 to 11 in"
    " the released models (default: the third, or the last if there are fewer). itc: of a layer of"
    " the ViT (default: the last)",
)


def main() -> None:
    """Parse the flags and run."""
    args = parser.parse_args()
    from engine.run import run_task

    run_task("grounding", args, mode=args.gradcam_mode, block_num=args.block_num)


if __name__ == "__main__":
    run_script(main)
