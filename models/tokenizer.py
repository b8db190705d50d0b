"""WordPiece tokenization as the released checkpoints were trained with: [CLS] and word pieces, no
[SEP].

`python -m models.tokenizer` trains a vocabulary on the captions of annotation files, in any
language. Such a vocabulary keeps the marks of letters (lower case, NFC).
"""

from configs.flags import Flags, at_least
from utils import begin_script, run_script

flags = Flags(
    "Train a WordPiece vocabulary on the captions of annotation files.",
    "train.json --size 5000 --output vocab.txt",
)
flags.add_argument("files", nargs="+", help="JSON lists of {image, caption}")
flags.add_argument(
    "--output",
    required=True,
    help="the file to write: vocab.txt, one word piece per line, with "
    "tokenizer_config.json beside it, or tokenizer.json, one file for both",
)
flags.add_argument("--overwrite", action="store_true", help="replace existing files")
flags.add_argument("--size", type=at_least(1), default=30522, help="largest number of word pieces")
if __name__ == "__main__":
    begin_script(flags)

import json
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, processors, trainers
from tokenizers.normalizers import NFC, BertNormalizer, Sequence
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import PreTrainedTokenizerFast

from configs.schema import BERT_KEYS, read_bert_config
from models.hub import find_file
from utils import InputError, atomic_write, is_main, read_regular

VOCABULARY, PIECES, SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
FILES = (VOCABULARY, PIECES)  # the first one in a folder is used
# uncased BERT's values of the keys of SETTINGS that are read; strip_accents None means
# do_lower_case
UNCASED = {
    "do_lower_case": True,
    "strip_accents": None,
    "tokenize_chinese_chars": True,
    "normalization": None,
}
OWN = {
    "tokenizer_class": "BertTokenizer",
    "do_lower_case": True,
    "strip_accents": False,
    "normalization": "NFC",
}
# shows how a tokenizer treats case, marks, signs and punctuation
PROBE = "É E\u0301 İ パ ハ\u309a 漢字 don't"
SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def build_tokenizer(source):
    """Return the tokenizer of a vocab file, tokenizer.json or checkpoint, of a folder with one of
    FILES, or of a hub name.

    tokenizer.json defines everything. A vocab.txt is read as uncased BERT's, unless a
    tokenizer_config.json beside it has other values of do_lower_case, strip_accents and
    tokenize_chinese_chars.

    It is called like any transformers tokenizer. Ids begin with [CLS] and have no [SEP]. Raises
    InputError if there is no usable vocabulary or the hub is out of reach.
    """
    path = find_file(source, FILES, "tokenizer")
    remedy = "name a vocab.txt or tokenizer.json; python -m models.tokenizer makes a vocab.txt from captions"
    try:
        if path.suffix in (".pth", ".safetensors"):
            from models.weights import read_checkpoint  # not at the top: it imports this module

            backend = Tokenizer.from_str(
                read_checkpoint(path).get("tokenizer_json") or "it has none"
            )
        elif path.suffix == ".json":
            backend = Tokenizer.from_file(str(path))
        else:
            vocab, settings = _read_vocab(path), _read_settings(source, path)
            backend = _word_pieces(vocab, settings)
            if not settings and is_main():
                _note_unused(path, vocab, backend.normalizer)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises no other class
        raise InputError(f"tokenizer: {path} is not a vocabulary ({error}): {remedy}") from None
    missing = [token for token in SPECIAL.values() if backend.token_to_id(token) is None]
    if missing:
        raise InputError(
            f"tokenizer: {path} is not a vocabulary, it lacks {', '.join(missing)}: {remedy}"
        )
    start = [("[CLS]", backend.token_to_id("[CLS]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


def _word_pieces(vocab, settings):
    """Return BERT's tokenizer. vocab: {piece: id}; settings: keys of tokenizer_config.json
    (default: uncased BERT's).
    """
    keys = UNCASED | settings
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    bert = BertNormalizer(
        lowercase=keys["do_lower_case"],
        strip_accents=keys["strip_accents"],
        handle_chinese_chars=keys["tokenize_chinese_chars"],
    )
    backend.normalizer = Sequence([NFC(), bert]) if keys["normalization"] == "NFC" else bert
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def settings_file(vocab):
    """Return the path of a vocab file's settings: tokenizer_config.json for vocab.txt, else
    STEM.tokenizer_config.json.
    """
    return vocab.with_name(SETTINGS if vocab.name == PIECES else f"{vocab.stem}.{SETTINGS}")


def _read_settings(source, vocab):
    """Return the settings of a vocab file, {} if they are missing; fetch them for a hub name.

    Raises ValueError.
    """
    path = settings_file(vocab)
    if not Path(source).exists():
        with suppress(InputError):  # the repository has none, or the hub is out of reach
            path = find_file(source, [SETTINGS], "tokenizer")
    try:
        settings = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not a JSON object")
    for key, default in UNCASED.items():
        if settings.get(key, default) not in (True, False, default, OWN.get(key)):
            raise ValueError(f"{path}: {key} is {settings[key]!r}")
    return settings


def _note_unused(path, vocab, normalizer):
    """Print a note if a vocab file without settings has pieces that uncased BERT never uses."""
    words = [piece.removeprefix("##") for piece in vocab if piece not in SPECIAL.values()]
    unused = [word for word in words if normalizer.normalize_str(word).strip() != word]
    if unused:
        print(
            f"note: tokenizer {path} drops accents and upper case; {len(unused)} of its pieces are never used, "
            f"{unused[0]!r} for one: is {settings_file(path)} missing?",
            file=sys.stderr,
        )


def difference(definition, other):
    """Return the first difference between two texts of tokenizer.json, "" if their ids are equal."""
    if definition == other:
        return ""
    vocabs, words = [], []
    for backend in map(Tokenizer.from_str, (definition, other)):
        vocabs.append({number: piece for piece, number in backend.get_vocab().items()})
        text = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
        words.append(
            backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else text
        )
    for number in sorted(vocabs[0].keys() | vocabs[1].keys()):
        pieces = [vocab.get(number, "not used") for vocab in vocabs]
        if pieces[0] != pieces[1]:
            return f"id {number} is {pieces[0]!r}, here {pieces[1]!r}"
    return (
        "" if words[0] == words[1] else "upper case, accents or punctuation are treated differently"
    )


def _read_vocab(path):
    """Return the word pieces of a vocab file, one in each line, with their ids.

    Raises ValueError, OSError.
    """
    pieces = {}
    # a piece may be a character at which splitlines would split
    for number, piece in enumerate(
        path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    ):
        if pieces.setdefault(piece, number) != number:
            raise ValueError(f"line {number + 1} repeats {piece!r} of line {pieces[piece] + 1}")
    return pieces


def vocabulary_of(config):
    """Return where the tokenizer of a configuration comes from, see tokenizer_of: a file, a folder
    or a hub name.
    """
    source, text_encoder = config["tokenizer"], config["text_encoder"]
    if not source and text_encoder == "random":
        raise InputError(
            "text_encoder is random, so the key tokenizer must name a vocab file, a folder or a hub name"
        )
    return source or (
        str(Path(text_encoder).parent) if Path(text_encoder).is_file() else text_encoder
    )


def tokenizer_of(config):
    """Return the tokenizer that a task's configuration names, checked against vocab_size of its
    bert_config.

    If the key tokenizer is missing, text_encoder names the tokenizer: the same hub name or folder,
    or the folder of a weight file. config["bert_config"] becomes a dict with every key; the
    vocab_size auto becomes the tokenizer's size. Raises InputError.
    """
    source = vocabulary_of(config)
    tokenizer = build_tokenizer(source)
    bert_config, size = read_bert_config(config["bert_config"]), len(tokenizer)
    config["bert_config"] = bert_config = {key: bert_config[key] for key in BERT_KEYS}
    if bert_config["vocab_size"] == "auto":
        bert_config["vocab_size"] = size
    if bert_config["vocab_size"] != size:
        raise InputError(
            f"tokenizer {source} has {size} word pieces and bert_config has vocab_size {bert_config['vocab_size']}: "
            f"name the tokenizer that belongs to the config, or set vocab_size to {size}"
        )
    most = bert_config["max_position_embeddings"]
    if (config["max_tokens"] or 0) > most:
        raise InputError(
            f"max_tokens is {config['max_tokens']}, and max_position_embeddings of bert_config {most}: lower it"
        )
    tokenizer.model_max_length = most  # unless the task has a smaller limit
    return tokenizer


def captions_of(files):
    """Yield every caption of annotation files whose entries have `caption`, a string or a list.

    Raises InputError.
    """
    remedy = "python -m dataset.to_json makes one from a table, a folder or an official file"
    for path in files:
        try:
            entries = json.loads(read_regular(path).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read as a JSON list ({error}); {remedy}") from None
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f'{path}: is not a JSON list with entries {{"image": ..., "caption": ...}}; {remedy}'
            )
        for index, entry in enumerate(entries):
            found = entry.get("caption") if isinstance(entry, dict) else None
            texts = found if isinstance(found, list) else [found]
            if not all(isinstance(text, str) for text in texts):
                raise InputError(
                    f"{path}: entry {index} (counting from 0) has no 'caption' of a text or a list of texts: "
                    "correct it"
                )
            # the trainer refuses halves of surrogate pairs, which JSON can hold
            yield from (text.encode("utf-8", "ignore").decode() for text in texts)


def train_vocab(captions, size, min_frequency=2):
    """Train a WordPiece vocabulary of at most `size` pieces on an iterable of captions; return the
    pieces in order.

    The same captions give the same pieces. The trainer numbers letters inside of words in the order
    of a hash table, which is another one in each process, and merges pairs of equal frequency by
    number. So these letters are given in order.
    """
    backend, captions = _word_pieces({}, OWN), list(captions)
    normalize, split = backend.normalizer.normalize_str, backend.pre_tokenizer.pre_tokenize_str
    words = Counter(word for caption in captions for word, _ in split(normalize(caption)))
    counts = Counter()
    for word, count in words.items():
        counts.update(dict.fromkeys(word, count))
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))[: max(1000, size)]
    inner = {letter for word in words for letter in word[1:]}
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[
            *SPECIAL.values(),
            *(f"##{letter}" for letter in letters if letter in inner),
        ],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    vocab = backend.get_vocab()
    return sorted(vocab, key=vocab.get)


def main():
    """Train a vocabulary from the command line."""
    args = flags.parse_args()
    pieces = train_vocab(captions_of(args.files), args.size)
    if len(pieces) == len(SPECIAL):
        raise InputError(
            f"{', '.join(args.files)}: no caption has a word, so there is no vocabulary"
        )
    output = Path(args.output)
    if output.suffix == ".json":
        backend = _word_pieces({piece: number for number, piece in enumerate(pieces)}, OWN)
        files = {output: backend.to_str(pretty=True)}
    else:
        files = {
            settings_file(output): json.dumps(OWN, indent=1),
            output: "".join(f"{piece}\n" for piece in pieces),
        }
    existing = [str(path) for path in files if path.exists()]
    if existing and not args.overwrite:
        raise InputError(
            f"--output: {', '.join(existing)} exists already: name another file, or add --overwrite"
        )
    try:
        os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
        for path, text in files.items():
            with atomic_write(path) as file:
                file.write(text.encode())
    except OSError as error:
        raise InputError(
            f"--output {args.output}: cannot write there ({error.strerror}), name another file"
        ) from None
    print(
        f"{', '.join(map(str, files))}: {len(pieces)} word pieces; vocab_size in bert_config must be {len(pieces)} or auto"
    )


if __name__ == "__main__":
    run_script(main)
