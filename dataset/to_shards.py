"""Write pre-training lists and their image files into WebDataset shards.

    python -m dataset.to_shards train.json [more.json] --image_root DIR --output DIR

Network and spinning disks read a few large files faster than millions of small ones. Images are
copied byte for byte, and equal inputs give equal shards. After an interruption the same command
continues.
"""

from pathlib import Path

from configs.flags import Flags, at_least
from engine.launch import begin_script, run_script

flags = Flags(__doc__.splitlines()[0])
flags.add_argument("lists", nargs="+", metavar="train.json", help="lists of {image, caption}")
flags.add_argument("--image_root", default="", help="folder that the lists' image paths start from")
flags.add_argument(
    "--output", "--output_dir", required=True, type=Path, metavar="DIR", help="folder of the shards"
)
flags.add_argument(
    "--samples", type=at_least(1), default=10000, help="entries of the lists in a shard"
)
flags.add_argument(
    "--processes",
    type=at_least(1),
    help="shards written at a time; the cores, 8 at most, by default",
)
if __name__ == "__main__":
    begin_script(flags)

import functools
import io
import json
import os
import sys
import tarfile

from tqdm import tqdm

from dataset.base import evenly
from dataset.caption import Pair
from dataset.images import ImageError, read_image
from dataset.pool import in_processes, process_count
from dataset.shards import IMAGE_SUFFIXES
from dataset.store import Entries
from engine.output_dir import make_output_dir
from models.hashes import hash_file
from utils import InputError, atomic_write, read_regular

MADE_OF = "shards.json"
CHECKED = 1000  # images looked for before the first is copied


def write_shard(job, annotations, image_root):
    """Write a shard: job is (path, indices of its entries). Returns how many entries it is of.

    An image that cannot be read is left out and named, with the reason, in %05d_skipped.txt. Raises
    InputError if the shard cannot be written; then there is none.
    """
    shard, indices = job
    list_of_skipped, skipped = shard.with_name(f"{shard.stem}_skipped.txt"), []
    try:
        with atomic_write(shard) as file, tarfile.open(fileobj=file, mode="w") as tar:
            for i in indices:
                entry = annotations[i]
                try:
                    image = read_image(os.path.join(image_root, entry.image))
                except ImageError as error:
                    skipped.append(f"{annotations.where(i)}: image {error}\n")
                    continue
                add_member(tar, f"{i:09d}.{_suffix(entry.image)}", image)
                add_member(tar, *_text(f"{i:09d}", entry.texts))
            if skipped:
                with atomic_write(list_of_skipped) as lines:
                    lines.write("".join(skipped).encode("utf-8", "backslashreplace"))
            else:
                list_of_skipped.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{shard}: cannot be written ({error.strerror}): make room and run the same command again, complete "
            "shards are kept"
        ) from None
    return len(indices)


def _suffix(path):
    suffix = os.path.splitext(path)[1][1:].lower()
    # readers find the image by the suffix, and its format by its bytes
    return suffix if suffix in IMAGE_SUFFIXES else "jpg"


def _text(key, captions):
    """Name and bytes of the member with the captions."""
    if len(captions) == 1:
        return f"{key}.txt", captions[0].encode("utf-8", "replace")
    return f"{key}.json", json.dumps({"caption": captions}, ensure_ascii=False).encode(
        "utf-8", "replace"
    )


def add_member(tar, name, data):
    """Append a file to an open tar file, without time, owner and what else differs from run to run."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def convert(files, image_root, output, samples, processes=None):
    """Write the shards of `samples` entries each that are not there yet, and skipped.txt. Returns
    (shards, entries left out).

    files: JSON lists as pre-training takes them. processes: default the cores, 8 at most. Raises
    InputError.
    """
    annotations = Entries(files, Pair)
    _check_images(annotations, image_root)
    make_output_dir(output, flag="--output")
    _check_origin(
        output,
        {
            "lists": [[os.path.abspath(file), hash_file(file)] for file in files],
            "image_root": os.path.abspath(image_root),
            "samples": samples,
        },
    )
    shards = {
        output / f"{first // samples:05d}.tar": range(first, min(first + samples, len(annotations)))
        for first in range(0, len(annotations), samples)
    }
    left = [(shard, indices) for shard, indices in shards.items() if not shard.exists()]
    write = functools.partial(write_shard, annotations=annotations, image_root=image_root)
    done = len(annotations) - sum(len(indices) for _, indices in left)
    with (
        tqdm(
            total=len(annotations),
            initial=done,
            desc="shards",
            unit="sample",
            file=sys.stdout,
            dynamic_ncols=True,
            mininterval=1,
        ) as bar,
        in_processes(process_count(len(left), processes)) as jobs,
    ):
        for count in jobs(write, left):
            bar.update(count)
    skipped = b"".join(path.read_bytes() for path in sorted(output.glob("*_skipped.txt")))
    with atomic_write(output / "skipped.txt") as file:
        file.write(skipped)
    return len(shards), skipped.count(b"\n")


def _check_images(annotations, image_root):
    """A wrong folder must not end in shards of nothing."""
    paths = [
        os.path.join(image_root, annotations[i].image) for i in evenly(len(annotations), CHECKED)
    ]
    if not any(map(os.path.isfile, paths)):
        raise InputError(
            f"--image_root {image_root or '(not given)'}: none of {len(paths)} images looked for exists, such as "
            f"{paths[0]}; name the folder that the lists' image paths start from"
        )


def _check_origin(output, origin):
    """Write what the shards are made of to shards.json; raises InputError if those in output are
    made of something else.
    """
    path = output / MADE_OF
    remedy = f"name another --output, or remove {output} to make all shards anew"
    try:
        before = json.loads(read_regular(path))
    except FileNotFoundError:
        if any(output.glob("*.tar")):
            raise InputError(
                f"--output {output}: holds shards but no {MADE_OF}, which says what they are made of: "
                f"{remedy}"
            ) from None
        with atomic_write(path, "w") as file:
            json.dump(origin, file, indent=1)
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): {remedy}") from None
    for key, value in origin.items():
        if not isinstance(before, dict) or before.get(key) != value:
            raise InputError(
                f"{path}: the shards there were made with other {key}: {remedy}, or use the command of then"
            )


def main():
    """Make shards from the command line and print the train_file line that names them."""
    args = flags.parse_args()
    count, skipped = convert(args.lists, args.image_root, args.output, args.samples, args.processes)
    if skipped:
        print(
            f"{skipped} entries were left out, their images cannot be read: {args.output / 'skipped.txt'}"
        )
    names = f"{{00000..{count - 1:05d}}}" if count > 1 else "00000"
    print(f"train_file: ['{args.output}/{names}.tar']")


if __name__ == "__main__":
    run_script(main)
