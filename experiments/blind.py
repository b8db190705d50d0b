r"""Write copies of annotation files whose images or texts are hidden, to train blind baselines.

  python -m experiments.blind data/shapes/ve_train.json data/shapes/ve_test.json \
      --without image --output data/blind

Each entry keeps its label. --without image gives all entries the same gray picture. --without text
gives all entries the text of the first entry.
"""

import json
from pathlib import Path
from typing import Any

from configs.cli import Parser
from engine.launch import run_script
from utils import atomic_write

GRAY = (128, 128, 128)
SIDE = 96  # pixels
TEXTS = ("sentence", "question")  # keys of an entry's text

parser = Parser(__doc__)
parser.add_argument("files", nargs="+", help="annotation files of visual entailment or VQA")
parser.add_argument("--without", choices=["image", "text"], required=True, help="input to remove")
parser.add_argument("--output", type=Path, required=True, help="folder of the copies")


def without(entries: list[dict[str, Any]], kind: str, picture: str) -> list[dict[str, Any]]:
    """Return copies of entries with one picture, or with one text.

    Args:
        entries: The entries.
        kind: image or text.
        picture: Path of the picture, without its suffix if the entries' paths have none.
    """
    if kind == "image":
        return [{**entry, "image": picture} for entry in entries]
    key = next(key for key in TEXTS if key in entries[0])
    return [{**entry, key: entries[0][key]} for entry in entries]


def main() -> None:
    """Write the copies."""
    args = parser.parse_args()
    from PIL import Image

    from dataset.entries import read_json_list

    args.output.mkdir(parents=True, exist_ok=True)
    picture = args.output.resolve() / "gray.jpg"
    if args.without == "image":
        Image.new("RGB", (SIDE, SIDE), GRAY).save(picture)
    for file in args.files:
        entries = read_json_list(file)
        has_suffix = Path(entries[0]["image"]).suffix
        name = str(picture if has_suffix else picture.with_suffix(""))
        with atomic_write(args.output / Path(file).name, "w") as copy:
            json.dump(without(entries, args.without, name), copy)
    print(f"{args.output}: {len(args.files)} files without {args.without}")


if __name__ == "__main__":
    run_script(main)
