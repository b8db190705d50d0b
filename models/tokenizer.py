"""WordPiece tokenization as the released checkpoints were trained with: [CLS] and word pieces, no [SEP].

`python -m models.tokenizer` trains a vocabulary on the captions of annotation files, in any language.
"""

from configs.flags import Flags
from utils import begin_script, run_script

flags = Flags("Train a WordPiece vocabulary on the captions of annotation files.", "train.json --size 5000 --output vocab.txt")
flags.add_argument("files", nargs="+", help="JSON lists of {image, caption}")
flags.add_argument("--output", required=True, help="the vocab file to write, one word piece per line")
flags.add_argument("--size", type=int, default=30522, help="most word pieces that it may have")
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
            vocab = {token: i for i, token in enumerate(path.read_text(encoding="utf-8").splitlines())}
            backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
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
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a JSON list: {error}") from None
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or "caption" not in entry:
                raise InputError(f"{path}: entry {index} has no 'caption'")
            yield from [entry["caption"]] if isinstance(entry["caption"], str) else entry["caption"]


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
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    with atomic_write(args.output, "w") as file:
        file.write("".join(f"{piece}\n" for piece in pieces))
    print(f"{args.output}: {len(pieces)} word pieces; vocab_size in bert_config must be {len(pieces)} or auto")


if __name__ == "__main__":
    run_script(main)
