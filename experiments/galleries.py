r"""Evaluate retrieval on a test file that is divided into galleries, with one caption per image.

  python -m experiments.galleries --checkpoint output/paper/full/seed0 \
      --test_file data/paper/tasks/test.json --output_dir output/galleries

Recall depends on the number of candidates. So recall is comparable only between galleries of equal
size. The metrics in log.txt are means over the galleries.
"""

import json
from pathlib import Path

import msgspec

from configs.cli import Parser, at_least
from engine.launch import run_script
from engine.output_dir import make_output_dir
from utils import InputError, atomic_write

parser = Parser(__doc__)
parser.add_argument("--checkpoint", required=True, help="checkpoint of pre-training or retrieval")
parser.add_argument("--test_file", required=True, help="JSON list of images with captions")
parser.add_argument("--size", type=at_least(2), default=500, help="number of images in a gallery")
parser.add_argument(
    "--k_test", type=at_least(1), nargs="+", default=[16], help="number of candidates to re-rank"
)
parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results")


def write_galleries(source: str, size: int, folder: Path) -> list[Path]:
    """Write the galleries of a test file, each with the first captions of `size` images.

    Raises:
        InputError: The file cannot be read, or has too few images for a gallery.
    """
    from dataset.entries import read_json_list

    entries, files = read_json_list(source), []
    for start in range(0, len(entries) - size + 1, size):
        gallery = [
            {"image": entry["image"], "caption": entry["caption"][:1]}
            for entry in entries[start : start + size]
        ]
        files.append(folder / f"gallery_{len(files)}.json")
        with atomic_write(files[-1], "w") as file:
            json.dump(gallery, file)
    if not files:
        raise InputError(
            f"--test_file {source} has only {len(entries)} images; lower --size {size}"
        )
    return files


def main() -> None:
    """Evaluate a checkpoint on the galleries of a test file."""
    args = parser.parse_args()
    from dataset.build import build_dataset
    from evaluation.retrieval import evaluate
    from inference import load_model

    make_output_dir(args.output_dir)
    root = Path(args.test_file).parent
    loaded = load_model(args.checkpoint, overrides=[f"image_root={root}"])
    results = []
    for file in write_galleries(args.test_file, args.size, args.output_dir):
        config = msgspec.structs.replace(loaded.config, test_file=[str(file)])
        dataset = build_dataset("retrieval", "test", config)
        model, tokenizer, device = loaded.model, loaded.tokenizer, loaded.device
        results.append(evaluate(model, dataset, tokenizer, config, device, ks=args.k_test))
    means = {f"test_{key}": sum(r[key] for r in results) / len(results) for key in results[0]}
    with atomic_write(args.output_dir / "log.txt", "w") as file:
        file.write(json.dumps(means) + "\n")
    print(f"{len(results)} galleries of {args.size} images")
    print(", ".join(f"{key} {value:.1f}" for key, value in means.items() if "r_mean" in key))


if __name__ == "__main__":
    run_script(main)
