"""The command line of the shapes data set."""

from configs.cli import Parser, at_least
from engine.launch import run_script


def main() -> None:
    """Make the data set from the command line."""
    flags = Parser("Make the shapes data set: images, vocabulary, annotation files of all tasks.")
    flags.add_argument(
        "--output",
        required=True,
        help="folder to write to; it is the image_root of the annotation files",
    )
    flags.add_argument("--train", type=int, default=16000, help="number of training scenes")
    flags.add_argument("--val", type=int, default=500, help="number of validation scenes")
    flags.add_argument("--test", type=int, default=500, help="number of test scenes")
    flags.add_argument(
        "--noise", type=float, default=0.05, help="share of corrupted pre-training captions"
    )
    flags.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="random seed of the scenes. Each combination of objects belongs to one split, the same"
        " for all seeds",
    )
    flags.add_argument(
        "--image_size", type=int, default=96, help="height and width of the images in pixels"
    )
    flags.add_argument("--captions", type=int, default=4, help="number of captions per image")
    flags.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a data set that was made with other arguments",
    )
    args = flags.parse_args()
    from .files import vocabulary, write_dataset

    made = write_dataset(**vars(args))
    print(
        f"{args.output}: {args.train} train, {args.val} val and {args.test} test scenes,"
        f" {args.captions} captions each, a vocabulary of {len(vocabulary())} word pieces"
        + ("" if made else " (already there)")
    )


if __name__ == "__main__":
    run_script(main)
