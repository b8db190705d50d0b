"""Train a WordPiece vocabulary on the captions of annotation files, in any language.

The vocabulary is in lower case and keeps accents (NFC). Set the configuration key tokenizer to the
path of the vocabulary.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.cli import Parser, at_least
from engine.launch import run_script
from utils import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_FREQUENCY = 2  # of a pair of pieces that the trainer merges

parser = Parser(__doc__, "train.json --size 5000 --output tokenizer.json")
parser.add_argument("files", nargs="+", help="JSON lists of {image, caption}")
parser.add_argument(
    "--output",
    required=True,
    type=Path,
    help="tokenizer.json to write",
)
parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
parser.add_argument("--size", type=at_least(1), default=30522, help="maximum number of word pieces")


def captions_of(files: list[str]) -> Iterator[str]:
    """Yield the captions of annotation files. Raises InputError if an entry has none."""
    from dataset.caption import Pair
    from dataset.store import Entries
    from dataset.text import without_halves

    for entry in Entries(files, Pair):
        yield from map(without_halves, entry.texts)


def lower_case_tokenizer(vocab: dict[str, int]) -> "Tokenizer":
    """Return BERT's tokenizer of these word pieces, in lower case and with accents in NFC."""
    from tokenizers.normalizers import NFC, Sequence

    from models.tokenizer import BertSettings, word_pieces

    backend = word_pieces(vocab, BertSettings(strip_accents=False))
    backend.normalizer = Sequence([NFC(), backend.normalizer])
    return backend


def frequencies(captions: Iterable[str]) -> Counter[str]:
    """Count the words of captions, after the tokenizer's normalization."""
    backend = lower_case_tokenizer({})
    normalize, split = backend.normalizer.normalize_str, backend.pre_tokenizer.pre_tokenize_str
    return Counter(word for caption in captions for word, _ in split(normalize(caption)))


def train_vocab(captions: Iterable[str], size: int) -> list[str]:
    """Train a WordPiece vocabulary.

    The same captions give the same pieces. The trainer numbers the letters inside of words in the
    order of a hash table that differs between processes, and merges pairs of equal frequency by
    number. So the letters are passed to it in a fixed order.

    Args:
        captions: Texts to train on.
        size: Largest number of pieces.

    Returns:
        The pieces in the order of their ids.
    """
    from tokenizers.trainers import WordPieceTrainer

    from models.tokenizer import SPECIAL

    backend, captions = lower_case_tokenizer({}), list(captions)
    words, counts = frequencies(captions), Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))[: max(1000, size)]
    inner = {letter for word in words for letter in word[1:]}
    trainer = WordPieceTrainer(
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[
            *SPECIAL,
            *(f"##{letter}" for letter in letters if letter in inner),
        ],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    vocab = backend.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)


def explain_size(captions: Iterable[str], size: int) -> str:
    """Return why the vocabulary of the captions has fewer pieces than `size`.

    The trainer has then merged all pairs that are frequent enough.
    """
    words = frequencies(captions)
    whole = sum(count >= MIN_FREQUENCY for count in words.values())
    return (
        f"the vocabulary has fewer pieces than --size {size:,}. Pieces are merged if they occur"
        f" together at least {MIN_FREQUENCY} times. {len(words) - whole:,} of the {len(words):,}"
        f" distinct words occur less often; the other {whole:,} words are pieces. More captions"
        " give more pieces"
    )


def main() -> None:
    """Train a vocabulary from the command line."""
    args = parser.parse_args()
    from engine.output_dir import check_output, make_output_dir, write_files
    from models.tokenizer import SPECIAL

    if args.output.suffix != ".json":
        raise InputError(f"--output {args.output}: not a .json file; end the name in .json")
    make_output_dir(args.output.parent, lock=False, flag="--output")
    captions = list(captions_of(args.files))
    pieces = train_vocab(captions, args.size)
    if len(pieces) == len(SPECIAL):
        raise InputError(
            f"{', '.join(args.files)}: no caption has a word, so there is no vocabulary;"
            " name lists with captions"
        )
    vocab = {piece: number for number, piece in enumerate(pieces)}
    check_output(args.output, overwrite=args.overwrite)
    write_files({args.output: lower_case_tokenizer(vocab).to_str(pretty=True).encode()})
    print(
        f"{args.output}: {len(pieces)} word pieces; vocab_size in bert_config must"
        f" be {len(pieces)} or auto"
    )
    if len(pieces) < args.size:
        print(f"note: {explain_size(captions, args.size)}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
