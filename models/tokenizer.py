"""WordPiece tokenization as the released checkpoints were trained with: [CLS] and word pieces, no [SEP].

`python -m models.tokenizer` trains a vocabulary on the captions of annotation files, in any language.
"""

from configs.flags import Flags, at_least
from utils import begin_script, run_script

flags = Flags("Train a WordPiece vocabulary on the captions of annotation files.", "train.json --size 5000 --output vocab.txt")
flags.add_argument("files", nargs="+", help="JSON lists of {image, caption}")
flags.add_argument("--output", required=True, help="the vocab file to write, one word piece per line")
flags.add_argument("--size", type=at_least(1), default=30522, help="most word pieces that it may have")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
from pathlib import Path

from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, processors
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from configs.schema import read_bert_config
from models.hub import find_file
from utils import InputError, atomic_write

FILES = ["vocab.txt", "tokenizer.json"]
SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip


def build_tokenizer(source):
    """Return the tokenizer of a vocab file, of a folder that holds vocab.txt or tokenizer.json, or of a hub name.

    Called on a list of texts with padding, truncation and max_length as any transformers tokenizer; its ids begin with
    [CLS] and have no [SEP]. Raises InputError where there is no usable vocabulary or the hub is out of reach.
    """
    path = find_file(source, FILES, "tokenizer")
    remedy = "name a vocab.txt or tokenizer.json; python -m models.tokenizer makes a vocab.txt from captions"
    try:
        if path.suffix == ".json":
            backend = Tokenizer.from_file(str(path))
        else:
            backend = Tokenizer(models.WordPiece(_read_vocab(path), unk_token="[UNK]", max_input_chars_per_word=100))
            backend.normalizer = BertNormalizer(lowercase=True)
            backend.pre_tokenizer = BertPreTokenizer()
            backend.decoder = decoders.WordPiece()
    except Exception as error:  # tokenizers raises no other class
        raise InputError(f"tokenizer: {path} is not a vocabulary ({error}): {remedy}") from None
    missing = [token for token in SPECIAL.values() if backend.token_to_id(token) is None]
    if missing:
        raise InputError(f"tokenizer: {path} is not a vocabulary, it lacks {', '.join(missing)}: {remedy}")
    start = [("[CLS]", backend.token_to_id("[CLS]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _read_vocab(path):
    """Return the word pieces of a vocab file, one in each line, with their ids. Raises ValueError, OSError."""
    pieces = {}
    # a piece may be a character at which splitlines would split
    for number, piece in enumerate(path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")):
        if pieces.setdefault(piece, number) != number:
            raise ValueError(f"line {number + 1} repeats {piece!r} of line {pieces[piece] + 1}")
    return pieces


def vocabulary_of(config):
    """Return where the tokenizer of a configuration comes from, see tokenizer_of: a file, a folder or a hub name."""
    source, text_encoder = config["tokenizer"], config["text_encoder"]
    if not source and text_encoder == "random":
        raise InputError("text_encoder is random, so the key tokenizer must name a vocab file, a folder or a hub name")
    return source or (str(Path(text_encoder).parent) if Path(text_encoder).is_file() else text_encoder)


def tokenizer_of(config):
    """Return the tokenizer that a task's configuration names, of the size that its bert_config says.

    Without the key tokenizer it is the one that belongs to text_encoder: the same hub name or folder, or the folder of a
    weight file. Where bert_config has the vocab_size auto, config["bert_config"] becomes a dict with the tokenizer's size.
    Raises InputError.
    """
    source = vocabulary_of(config)
    tokenizer = build_tokenizer(source)
    bert_config, size = read_bert_config(config["bert_config"]), len(tokenizer)
    if bert_config["vocab_size"] == "auto":
        config["bert_config"] = bert_config = {**bert_config, "vocab_size": size}
    if bert_config["vocab_size"] != size:
        raise InputError(
            f"tokenizer {source} has {size} word pieces and bert_config has vocab_size {bert_config['vocab_size']}: "
            f"name the tokenizer that belongs to the config, or set vocab_size to {size}"
        )
    tokenizer.model_max_length = bert_config["max_position_embeddings"]  # where the task itself sets no limit
    return tokenizer


def captions_of(files):
    """Yield every caption of annotation files whose entries have `caption`, a string or a list. Raises InputError."""
    for path in files:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as a JSON list: {error}") from None
        if not isinstance(entries, list) or not entries:
            raise InputError(f'{path}: is not a JSON list with entries {{"image": ..., "caption": ...}}')
        for index, entry in enumerate(entries):
            found = entry.get("caption") if isinstance(entry, dict) else None
            texts = found if isinstance(found, list) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(f"{path}: entry {index} (counting from 0) has no 'caption' of a text or a list of texts: "
                                 "correct it")  # fmt: skip
            # the trainer refuses halves of surrogate pairs, which JSON can hold
            yield from (text.encode("utf-8", "ignore").decode() for text in texts)


def train_vocab(captions, size, min_frequency=2):
    """Train a WordPiece vocabulary of at most `size` pieces on an iterable of captions; return the pieces in order."""
    trainer = BertWordPieceTokenizer(lowercase=True)
    trainer.train_from_iterator(
        captions, vocab_size=size, min_frequency=min_frequency, special_tokens=list(SPECIAL.values()), show_progress=False
    )
    vocab = trainer.get_vocab()
    return sorted(vocab, key=vocab.get)


def main():
    """Train a vocabulary from the command line."""
    args = flags.parse_args()
    pieces = train_vocab(captions_of(args.files), args.size)
    if len(pieces) == len(SPECIAL):
        raise InputError(f"{', '.join(args.files)}: no caption has a word, so there is no vocabulary")
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        with atomic_write(args.output) as file:
            file.write("".join(f"{piece}\n" for piece in pieces).encode())
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot write there ({error.strerror}), name another file") from None
    print(f"{args.output}: {len(pieces)} word pieces; vocab_size in bert_config must be {len(pieces)} or auto")


if __name__ == "__main__":
    run_script(main)
