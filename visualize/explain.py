"""Explain a model's decision on an image and a text: heat maps, and pseudo-targets of MoD."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from configs.tasks import find_task
from dataset.text import tokenize, without_halves
from evaluation.vqa import answer_questions, tokenize_answers
from models.albef import ALBEF
from models.contrastive import ContrastiveModel, feature_similarity
from models.gradcam import cross_gradcam, default_block, itc_gradcam
from models.pretrain import Pretrain
from models.tokenizer import Tokenizer
from models.vqa import VQA, Question
from utils import Text

UNKNOWN = " [UNK]"  # follows a word that the vocabulary lacks
TOP = 5  # candidates of each pseudo-target, as in Figure 2
BATCH = 256  # texts encoded at a time


class Phrase(NamedTuple):
    """A tokenized text and its words.

    Attributes:
        text: The text after clean-up.
        tokens: [CLS] and word pieces [1, L].
        words: The W words of the text, UNKNOWN after each that the vocabulary lacks.
        pieces: Positions of each word's pieces, in 1 .. L-1.
    """

    text: str
    tokens: Text
    words: list[str]
    pieces: list[list[int]]


class HeatMaps(NamedTuple):
    """Heat maps of a decision about I images, on their patch grids.

    Attributes:
        whole: Maps of the text as a whole [I, h, w].
        by_word: Maps of the words [I, W, h, w].
        verdict: The decision and its score.
    """

    whole: Tensor
    by_word: Tensor
    verdict: str


class Candidate(NamedTuple):
    """A word or text that the momentum model proposes.

    Attributes:
        text: The word or text.
        score: Probability of the word or text.
        hit: Whether the caption has it.
    """

    text: str
    score: float
    hit: bool


def token_limit(model: ALBEF) -> int:
    """Return the number of tokens that a model reads at most."""
    return model.config.max_tokens or model.bert_config.max_position_embeddings


def split_words(text: str, model: ALBEF, tokenizer: Tokenizer) -> Phrase:
    """Tokenize a cleaned-up text into a Phrase on the model's device.

    BERT's pre-tokenizer splits words at blanks, and makes each symbol that clean-up keeps a word.
    """
    text, limit = without_halves(text), token_limit(model)
    encoding, pieces = tokenizer.backend_tokenizer.encode(text), {}
    for position, word in enumerate(encoding.word_ids[:limit]):
        if word is not None:
            pieces.setdefault(word, []).append(position)
    ids, words = encoding.ids[:limit], []
    for word, positions in pieces.items():
        # None only for a word that word_ids does not have
        start, end = encoding.word_to_chars(word)  # ty: ignore[not-iterable]
        words.append(text[start:end] + UNKNOWN * (ids[positions[0]] == tokenizer.unk_token_id))
    ids = torch.tensor([ids], device=model.bert.embeddings.position_ids.device)
    return Phrase(text, Text(ids, torch.ones_like(ids)), words, list(pieces.values()))


def unknown_words(words: Iterable[str]) -> list[str]:
    """Return a line that names the words with UNKNOWN, or no line if there are none."""
    lacking = ", ".join(word.removesuffix(UNKNOWN) for word in words if word.endswith(UNKNOWN))
    return (
        [f"not in the vocabulary, so the model reads each as [UNK]: {lacking}"] if lacking else []
    )


def join_pieces(heat: Tensor, pieces: list[list[int]]) -> Tensor:
    """Average heat maps of tokens [I, L, h, w] over the pieces of each word -> [I, W, h, w]."""
    return torch.stack([heat[:, positions].mean(dim=1) for positions in pieces], dim=1)


@torch.no_grad()
def _cross_attention_maps(
    model: ALBEF,
    image: Tensor,
    phrase: Phrase,
    block_num: int | None,
    score: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heat maps of score(fused [1, L, C]), whole and by word, and the score."""
    image_embeds = model.visual_encoder.forward_features(image)
    keys_values = model.bert.image_keys_values(image_embeds)
    block_num = default_block(model, words=True) if block_num is None else block_num
    maps, value = cross_gradcam(model, keys_values, phrase.tokens, block_num, score)
    heat = torch.cat(maps)  # [I, L, h, w]
    return heat.mean(dim=1), join_pieces(heat, phrase.pieces), value


def explain_class(
    task: str,
    model: ALBEF,
    image: Tensor,
    phrase: Phrase,
    *,
    block_num: int | None = None,
) -> HeatMaps:
    """Explain the most probable class, or "match" of a model that matches images and texts.

    Args:
        task: Task of the model, with a `head` in configs/tasks.py.
        model: Model in eval mode.
        image: One image, or two for a task with pairs: [I, 3, H, W].
        phrase: The text.
        block_num: Layer with cross-attention. Default: the third, but not the last.
    """
    row = find_task(task)
    verdict = ""

    def score(fused: Tensor) -> Tensor:
        nonlocal verdict
        logits = getattr(model, row.head)(fused[0, 0])
        shown = 1 if row.head == "itm_head" else int(logits.argmax())
        verdict = f"{row.classes[shown]} {100 * logits.softmax(dim=0)[shown].item():.1f}%"
        return logits[shown]

    whole, by_word, _ = _cross_attention_maps(model, image, phrase, block_num, score)
    return HeatMaps(whole, by_word, verdict)


@torch.no_grad()
def explain_similarity(
    model: ContrastiveModel, image: Tensor, phrase: Phrase, block_num: int | None = None
) -> HeatMaps:
    """Explain the contrastive similarity; the maps have no words.

    Args:
        model: Model of a contrastive task in eval mode.
        image: The image [1, 3, H, W].
        phrase: The text.
        block_num: Block of the ViT. Default: the last.
    """
    block_num = default_block(model, "itc") if block_num is None else block_num
    heat = itc_gradcam(model, image, phrase.tokens, block_num)
    similarity = feature_similarity(
        model.encode_image(image)[1], model.encode_text(phrase.tokens)[1]
    ).item()
    return HeatMaps(heat, heat.new_zeros(1, 0, *heat.shape[1:]), f"similarity {similarity:.3f}")


def find_answer(
    model: VQA, image: Tensor, phrase: Phrase, answers: list[str], tokenizer: Tokenizer
) -> tuple[str, Tensor]:
    """Return the most probable answer and its token ids.

    Args:
        model: Model of VQA in eval mode.
        image: The image [1, 3, H, W].
        phrase: The question.
        answers: Answers to choose from; beam search finds one if the list is empty.
        tokenizer: Tokenizer of the model.

    Returns:
        The answer, and its token ids [1, L'] from [CLS] to eos.
    """
    if answers:
        tokens = tokenize_answers(answers, model, tokenizer)
        (((answer, _), *_),) = answer_questions(
            model, image, phrase.tokens, answers, tokens, tokenizer
        )
        return answer, tokenize_answers([answer], model, tokenizer).input_ids
    (ids,), _ = model.generate(image, phrase.tokens, model.config.num_beams)
    special = model.special_ids
    return tokenizer.decode(ids), torch.tensor(
        [[special.cls, *ids, special.eos]], device=image.device
    )


def explain_answer(
    model: VQA,
    image: Tensor,
    phrase: Phrase,
    answers: list[str],
    tokenizer: Tokenizer,
    *,
    block_num: int | None = None,
) -> HeatMaps:
    """Explain the log-probability of the answer that `find_answer` returns for these arguments."""
    answer, ids = find_answer(model, image, phrase, answers, tokenizer)

    def score(fused: Tensor) -> Tensor:
        keys_values = model.text_decoder.bert.image_keys_values(fused)
        states = Question(keys_values, phrase.tokens.attention_mask)
        log_probs = model.answer_logits(states, ids, ids.new_zeros(1)).log_softmax(
            dim=-1
        )  # [1, L'-1, V]
        return log_probs.gather(2, ids[:, 1:, None]).sum()

    whole, by_word, log_prob = _cross_attention_maps(model, image, phrase, block_num, score)
    return HeatMaps(whole, by_word, f"answer: {answer or '(empty)'}, log p {log_prob:.2f}")


@torch.no_grad()
def word_targets(
    model: Pretrain, image_embeds: Tensor, phrase: Phrase, tokenizer: Tokenizer
) -> list[list[Candidate]]:
    """Return the momentum model's TOP candidates for each word of a caption, the best first.

    All pieces of a word are masked, and the first one is predicted.

    Args:
        model: Model of pre-training in eval mode.
        image_embeds: Embeddings of the momentum image encoder [1, 1+N, C].
        phrase: The caption.
        tokenizer: Tokenizer of the model.
    """
    ids, rows = phrase.tokens.input_ids, len(phrase.words)
    masked, mask = ids.repeat(rows, 1), phrase.tokens.attention_mask.expand(rows, -1)
    for row, positions in zip(masked, phrase.pieces, strict=True):
        row[positions] = model.special_ids.mask
    bert = model.bert_m
    # [W, L, C]
    fused = bert.fuse(bert.encode_text(masked, mask), mask, bert.image_keys_values(image_embeds))
    first = torch.tensor([positions[0] for positions in phrase.pieces], device=ids.device)
    hidden = fused[torch.arange(rows, device=ids.device), first]
    # [W, TOP]
    probs, best = model.text_encoder_m.cls.predictions(hidden).softmax(dim=1).topk(TOP, dim=1)
    return [
        [
            Candidate(tokenizer.convert_ids_to_tokens(i), p, i == true)
            for i, p in zip(*candidates, strict=True)
        ]
        for true, *candidates in zip(
            ids[0, first].tolist(), best.tolist(), probs.tolist(), strict=True
        )
    ]


@torch.no_grad()
def text_targets(
    model: Pretrain, image_feat: Tensor, texts: list[str], caption: str, tokenizer: Tokenizer
) -> list[Candidate]:
    """Return the TOP texts that are most similar to an image for the momentum model.

    Their scores are the pseudo-targets of ITC: Equation 1 with momentum features (Section 3.3).

    Args:
        model: Model of pre-training in eval mode.
        image_feat: Feature of the momentum image encoder [1, D].
        texts: Distinct texts after clean-up.
        caption: Caption of the image, which is a hit.
        tokenizer: Tokenizer of the model.
    """
    similarities = []
    for start in tqdm(range(0, len(texts), BATCH), desc="texts", leave=False, disable=None):
        batch = texts[start : start + BATCH]
        tokens = tokenize(batch, tokenizer, token_limit(model)).to(image_feat.device)
        _, text_feat = model.encode_text(tokens, momentum=True)
        similarities.append(feature_similarity(image_feat, text_feat)[0])
    probs = (torch.cat(similarities) / model.temp).softmax(dim=0)
    values, best = probs.topk(min(TOP, len(texts)))
    return [
        Candidate(texts[i], value, texts[i] == caption)
        for value, i in zip(values.tolist(), best.tolist(), strict=True)
    ]
