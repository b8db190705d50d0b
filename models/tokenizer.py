"""WordPiece tokenization of the released checkpoints: [CLS] and word pieces, no [SEP]."""

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from configs.config import Config, as_config
from models.hub import find_file
from utils import InputError

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY, PIECES, SETTINGS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
FILES = (VOCABULARY, PIECES)  # the first one in a folder is used
# text that shows how a tokenizer treats case, accents, symbols and punctuation
PROBE = "É E\u0301 İ パ ハ\u309a 漢字 don't"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REMEDY = (
    "name a vocab.txt or tokenizer.json, or make one from captions with python -m tools.vocabulary"
)


class BertSettings(msgspec.Struct):
    """The keys of tokenizer_config.json that are read, with the values of uncased BERT.

    Attributes:
        do_lower_case: Whether texts are converted to lower case.
        strip_accents: Whether accents are removed. None follows do_lower_case.
        tokenize_chinese_chars: Whether each Chinese sign is a word.
    """

    do_lower_case: bool = True
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool = True


class Encoding(dict):
    """Token ids and attention mask of texts, as keys and as attributes."""

    @property
    def input_ids(self) -> "list | Tensor":
        """Token ids, [B, L] as a tensor."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> "list | Tensor":
        """1 for a token, 0 for padding, [B, L] as a tensor."""
        return self["attention_mask"]


class Tokenizer:
    """Convert texts to token ids, with the interface of the transformers library.

    Attributes:
        backend_tokenizer: The tokenizer of the tokenizers library, with offsets and `to_str`.
        model_max_length: Largest number of ids that `truncation` leaves without a `max_length`.
        pad_token_id: Id of [PAD]; likewise unk, cls, sep and mask.
        all_special_ids: Ids of all special tokens.
    """

    def __init__(self, backend: Backend) -> None:
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        vocab = backend.get_vocab()
        ids = [vocab[token] for token in SPECIAL]
        self.pad_token_id, self.unk_token_id, self.cls_token_id, self.sep_token_id, _ = ids
        self.mask_token_id, self.all_special_ids = ids[-1], ids
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A", special_tokens=[("[CLS]", self.cls_token_id)]
        )
        # a tokenizer.json of sentence-transformers pads and cuts all texts
        backend.no_padding()
        backend.no_truncation()
        self.backend_tokenizer = backend
        self.model_max_length = sys.maxsize

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def __call__(
        self,
        text: str | list[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        verbose: bool = False,
    ) -> Encoding:
        """Tokenize one text or a list of texts.

        Args:
            text: Texts after clean-up.
            padding: Whether to pad all texts to the longest one.
            truncation: Whether to cut texts after `max_length` ids.
            max_length: Default: `model_max_length`.
            return_tensors: "pt" for tensors [B, L] in place of lists.
            verbose: Without effect, accepted for callers of transformers' tokenizers.
        """
        one = isinstance(text, str)
        rows = self.backend_tokenizer.encode_batch_fast([text] if one else text)
        limit = (max_length or self.model_max_length) if truncation else None
        ids = [row.ids[:limit] for row in rows]
        length = max(map(len, ids), default=0) if padding else 0
        masks = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
        ids = [row + [self.pad_token_id] * (length - len(row)) for row in ids]
        if return_tensors:
            import torch

            return Encoding(input_ids=torch.tensor(ids), attention_mask=torch.tensor(masks))
        ids, masks = (ids[0], masks[0]) if one else (ids, masks)
        return Encoding(input_ids=ids, attention_mask=masks)

    def decode(self, ids: "Iterable[int] | Tensor", skip_special_tokens: bool = False) -> str:
        """Return the text of token ids [L]."""
        return self.backend_tokenizer.decode(list(map(int, ids)), skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int:
        """Return the id of a word piece. An unknown piece has the id of [UNK]."""
        found = self.backend_tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, token_id: int) -> str:
        """Return the word piece of an id, "" for an unknown id."""
        return self.backend_tokenizer.id_to_token(token_id) or ""


def build_tokenizer(source: Path | str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        source: A vocab.txt, a tokenizer.json, a checkpoint with a vocabulary, a folder with one of
            FILES, or a hub name. A tokenizer.json defines everything. A vocab.txt is read as
            uncased BERT's unless a tokenizer_config.json beside it has other BertSettings.

    Raises:
        InputError: There is no usable vocabulary, or the hub cannot be reached.
    """
    path = find_file(source, FILES, "tokenizer")
    try:
        if path.suffix in (".pth", ".safetensors"):
            from models.weights import read_checkpoint  # which imports this module

            backend = Backend.from_str(read_checkpoint(path).get("tokenizer_json") or "it has none")
        elif path.suffix == ".json":
            backend = Backend.from_file(str(path))
        else:
            backend = word_pieces(_read_vocab(path), _read_settings(source, path))
    except InputError:
        raise
    except Exception as error:  # tokenizers raises no other class
        raise InputError(f"tokenizer: {path} is not a vocabulary ({error}); {REMEDY}") from None
    missing = [token for token in SPECIAL if backend.token_to_id(token) is None]
    if missing:
        raise InputError(
            f"tokenizer: {path} is not a vocabulary, because it lacks {', '.join(missing)};"
            f" {REMEDY}"
        )
    return Tokenizer(backend)


def word_pieces(vocab: dict[str, int], settings: BertSettings) -> Backend:
    """Return BERT's tokenizer with these word pieces, by their ids."""
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    backend.normalizer = BertNormalizer(
        lowercase=settings.do_lower_case,
        strip_accents=settings.strip_accents,
        handle_chinese_chars=settings.tokenize_chinese_chars,
    )
    backend.pre_tokenizer = BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _read_vocab(path: Path) -> dict[str, int]:
    """Return the word pieces of a vocab file, one a line, with their ids.

    Raises:
        ValueError: A piece is repeated, or the file is not UTF-8.
        OSError: The file cannot be read.
    """
    pieces = {}
    # a piece may be a character at which splitlines would split
    lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    for number, piece in enumerate(lines):
        if pieces.setdefault(piece, number) != number:
            raise ValueError(f"line {number + 1} repeats {piece!r} of line {pieces[piece] + 1}")
    return pieces


def _read_settings(source: Path | str, vocab: Path) -> BertSettings:
    """Return the settings of a vocab file, uncased BERT's if they are missing.

    Args:
        source: Origin of the vocab file. If it is a hub name, the settings are downloaded.
        vocab: The vocab file.

    Raises:
        ValueError: The settings cannot be used.
    """
    path = vocab.with_name(SETTINGS)
    if not Path(source).exists():
        with suppress(InputError):  # the repository has none, or the hub is out of reach
            path = find_file(source, [SETTINGS], "tokenizer")
    try:
        return msgspec.json.decode(
            path.read_bytes() if path.is_file() else b"{}", type=BertSettings
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def difference(definition: str, other: str) -> str:
    """Return the first difference between two tokenizers, "" if their ids are equal.

    Args:
        definition: The text of a tokenizer.json.
        other: The text of another one.
    """
    if definition == other:
        return ""
    vocabs, words = [], []
    for backend in map(Backend.from_str, (definition, other)):
        vocabs.append(backend.get_vocab().items())
        text = backend.normalizer.normalize_str(PROBE) if backend.normalizer else PROBE
        split = backend.pre_tokenizer
        words.append(split.pre_tokenize_str(text) if split else text)
    if pieces := vocabs[0] ^ vocabs[1]:
        piece, number = min(pieces, key=itemgetter(1))
        return f"{piece!r} has the id {number} in only one of them"
    return "" if words[0] == words[1] else "case, accents or punctuation are treated differently"


def vocabulary_of(config: Config) -> str:
    """Return the file, folder or hub name of a configuration's vocabulary, see `load_tokenizer`.

    Raises:
        InputError: The configuration names none.
    """
    source = config.text_encoder
    if config.tokenizer:
        return config.tokenizer
    if source == "random":
        raise InputError(
            "text_encoder is random, so no vocabulary is known; set the key tokenizer to a"
            " vocabulary file, a folder or a hub name"
        )
    return str(Path(source).parent) if Path(source).is_file() else source


def load_tokenizer(config: Config | Mapping[str, Any]) -> tuple[Tokenizer, Config]:
    """Load the tokenizer that a configuration names and check that its size fits bert_config.

    Without the key tokenizer, text_encoder names it: the same hub name or folder, or the folder of
    a weight file.

    Returns:
        The tokenizer, and the configuration with its size in place of the vocab_size `auto`.

    Raises:
        InputError: The tokenizer cannot be loaded, or it does not fit bert_config.
    """
    config = as_config(config)
    source = vocabulary_of(config)
    tokenizer, bert = build_tokenizer(source), config.bert
    size = len(tokenizer)
    if bert.vocab_size not in ("auto", size):
        raise InputError(
            f"tokenizer {source} has {size} word pieces, but bert_config has vocab_size"
            f" {bert.vocab_size}; name the tokenizer that belongs to bert_config, or set vocab_size"
            f" to {size}"
        )
    most = bert.max_position_embeddings
    if (config.max_tokens or 0) > most:
        raise InputError(
            f"max_tokens is {config.max_tokens}, but max_position_embeddings of bert_config is"
            f" {most}; lower max_tokens"
        )
    tokenizer.model_max_length = most  # unless the task has a smaller limit
    bert = msgspec.structs.replace(bert, vocab_size=size)
    return tokenizer, msgspec.structs.replace(config, bert_config=bert)
