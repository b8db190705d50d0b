"""Write pre-training lists and their image files into WebDataset shards.

Network file systems and hard disks read a few large files faster than millions of small ones.
Images are copied byte for byte. Equal inputs give equal shards. To continue after an
interruption, repeat the command.
"""

import functools
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.cli import Parser, at_least
from engine.launch import run_script
from utils import InputError, atomic_write

if TYPE_CHECKING:
    from dataset.store import Entries

MADE_OF = "shards.json"
CHECKED = 1000  # images whose existence is checked before the first is copied

parser = Parser(__doc__.splitlines()[0], "train.json --image_root photos --output data/shards")
parser.add_argument("lists", nargs="+", metavar="train.json", help="JSON lists of {image, caption}")
parser.add_argument("--image_root", default="", help="folder that the image paths start from")
parser.add_argument(
    "--output", required=True, type=Path, metavar="DIR", help="folder of the shards"
)
parser.add_argument(
    "--samples", type=at_least(1), default=10000, help="number of list entries per shard"
)
parser.add_argument(
    "--workers",
    type=at_least(1),
    help="number of shards written in parallel (default: the number of cores, at most 8)",
)


def write_shard(job: tuple[Path, Sequence[int]], annotations: "Entries", image_root: str) -> int:
    """Write a shard, and the images that cannot be read into %05d_skipped.txt.

    Args:
        job: Path of the shard, and indices of its entries.
        annotations: Entries of the lists.
        image_root: Folder that the image paths start from.

    Returns:
        The number of entries of the shard.

    Raises:
        TrainingStopped: The shard cannot be written. Then it does not exist.
    """
    from dataset.images import ImageError, read_image
    from engine.output_dir import write_files, writing

    shard, indices = job
    list_of_skipped, skipped = shard.with_name(f"{shard.stem}_skipped.txt"), []
    remedy = "make room and repeat the command, which keeps complete shards"
    with (
        writing(shard, remedy),
        atomic_write(shard) as file,
        tarfile.open(fileobj=file, mode="w") as tar,
    ):
        for i in indices:
            entry = annotations[i]
            try:
                image = read_image(os.path.join(image_root, entry.image))
            except ImageError as error:
                skipped.append(f"{annotations.where(i)}: image {error}\n")
                continue
            add_member(tar, f"{i:09d}.{_suffix(entry.image)}", image)
            add_member(tar, *_captions_file(f"{i:09d}", entry.texts))
        list_of_skipped.unlink(missing_ok=True)
        if skipped:
            write_files({list_of_skipped: "".join(skipped).encode("utf-8", "backslashreplace")})
    return len(indices)


def _suffix(path: str) -> str:
    """Return the suffix of an image in a shard. Its format is decided by its bytes."""
    from dataset.shards import IMAGE_SUFFIXES

    suffix = os.path.splitext(path)[1][1:].lower()
    return suffix if suffix in IMAGE_SUFFIXES else "jpg"


def _captions_file(key: str, captions: list[str]) -> tuple[str, bytes]:
    """Return the name and the bytes of the member with the captions."""
    if len(captions) == 1:
        return f"{key}.txt", captions[0].encode("utf-8", "replace")
    content = json.dumps({"caption": captions}, ensure_ascii=False)
    return f"{key}.json", content.encode("utf-8", "replace")


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file to an open tar file, without time, owner and other data of this run."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def convert(
    files: Sequence[str],
    image_root: str,
    output: Path,
    *,
    samples: int,
    workers: int | None = None,
) -> tuple[int, int]:
    """Write the shards that do not exist yet, and skipped.txt.

    Args:
        files: JSON lists in the form of pre-training.
        image_root: Folder that the image paths start from.
        output: Folder of the shards.
        samples: Entries in a shard.
        workers: Shards written at a time, by default the number of cores, 8 at most.

    Returns:
        The number of shards, and the number of entries that were left out.

    Raises:
        InputError: A list is wrong, no image exists, or `output` holds shards of other lists.
        TrainingStopped: `output` cannot be written.
    """
    from dataset.caption import Pair
    from dataset.store import Entries
    from engine.output_dir import make_output_dir, write_files
    from models.hashes import hash_file

    annotations = Entries(files, Pair)
    _check_images(annotations, image_root)
    make_output_dir(output, flag="--output")
    origin = {
        "lists": [[os.path.abspath(file), hash_file(file)] for file in files],
        "image_root": os.path.abspath(image_root),
        "samples": samples,
    }
    _check_origin(output, origin)
    total = len(annotations)
    parts = [range(first, min(first + samples, total)) for first in range(0, total, samples)]
    shards = [(output / f"{number:05d}.tar", part) for number, part in enumerate(parts)]
    _write_missing(shards, annotations, image_root, workers)
    skipped = b"".join(path.read_bytes() for path in sorted(output.glob("*_skipped.txt")))
    write_files({output / "skipped.txt": skipped})
    return len(shards), skipped.count(b"\n")


def _write_missing(
    shards: list[tuple[Path, range]], annotations: "Entries", image_root: str, workers: int | None
) -> None:
    """Write the shards that do not exist yet."""
    from tqdm import tqdm

    from dataset.pool import in_processes, process_count

    missing = [(shard, part) for shard, part in shards if not shard.exists()]
    write = functools.partial(write_shard, annotations=annotations, image_root=image_root)
    total = len(annotations)
    done = total - sum(len(part) for _, part in missing)
    with (
        tqdm(total=total, initial=done, desc="shards", unit="sample", disable=None) as bar,
        in_processes(process_count(len(missing), workers)) as jobs,
    ):
        for count in jobs(write, missing):
            bar.update(count)


def _check_images(annotations: "Entries", image_root: str) -> None:
    """Raise InputError if none of some images exists: image_root is then wrong."""
    from dataset.base import evenly

    indices = evenly(len(annotations), CHECKED)
    paths = [os.path.join(image_root, annotations[i].image) for i in indices]
    if not any(map(os.path.isfile, paths)):
        raise InputError(
            f"--image_root {image_root or '(not given)'}: none of {len(paths)} checked images"
            f" exists, for example {paths[0]}; name the folder that image paths in the lists are"
            " relative to"
        )


def _check_origin(output: Path, origin: dict[str, Any]) -> None:
    """Write shards.json, which records the inputs of the shards.

    Raises InputError if the shards in `output` were made from other inputs.
    """
    from engine.output_dir import write_files

    path, content = output / MADE_OF, json.dumps(origin, indent=1).encode()
    before = path.read_bytes() if path.exists() else None
    if before != content and (before or any(output.glob("*.tar"))):
        raise InputError(
            f"--output {output}: holds shards of other lists, or of another --image_root or"
            f" --samples; name another --output, or remove {output} to make all shards again"
        )
    write_files({path: content})


def main() -> None:
    """Write shards and print the train_file line that names them."""
    args = parser.parse_args()
    count, skipped = convert(
        args.lists,
        args.image_root,
        args.output,
        samples=args.samples,
        workers=args.workers,
    )
    if skipped:
        print(
            f"{skipped} entries were left out, because their images cannot be read"
            f" ({args.output / 'skipped.txt'} lists them)"
        )
    names = f"{{00000..{count - 1:05d}}}" if count > 1 else "00000"
    print(f"train_file: ['{args.output}/{names}.tar']")


if __name__ == "__main__":
    run_script(main)
