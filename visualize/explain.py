"""What a trained model makes of a picture and a text: heat maps of its decision, pseudo-targets of
its momentum model.
"""

from typing import NamedTuple

import torch
from tqdm import tqdm

from dataset import nlvr, ve
from dataset.text import tokenize, without_halves
from evaluation.vqa import answer_questions, tokenize_answers
from models.contrastive import feature_similarity
from models.gradcam import cross_gradcam, default_block, itc_gradcam
from utils import Text

# the head on the multimodal [CLS] and its classes in order, of matching only the one that is shown
HEADS = {
    "pretrain": ("itm_head", (None, "match")),
    "retrieval": ("itm_head", (None, "match")),
    "relevance": ("itm_head", (None, "relevant")),
    "ve": ("cls_head", tuple(ve.LABELS)),
    "nlvr": ("cls_head", tuple(nlvr.LABELS)),
    "nlvr_pretrain": ("ta_head", ("first", "second", "neither")),
}
UNKNOWN = " [UNK]"  # follows a word that the vocabulary lacks
TOP = 5  # candidates that pseudo-targets show, as in Figure 2
BATCH = 256  # texts encoded at a time


class Phrase(NamedTuple):
    """A text as a model reads it, and its words."""

    text: str  # after clean-up
    tokens: Text  # [1, L]: [CLS] and word pieces
    words: list  # the W words of the text, UNKNOWN after those that the vocabulary lacks
    pieces: list  # for each word the positions of its pieces, in 1 .. L-1


class HeatMaps(NamedTuple):
    """Where in I images a decision comes from, on their patch grids."""

    whole: torch.Tensor  # [I, h, w], the text as a whole
    by_word: torch.Tensor  # [I, W, h, w]
    verdict: str  # the decision and its score


class Candidate(NamedTuple):
    """A word or text that the momentum model proposes."""

    text: str
    score: float  # probability of a word, similarity of a text
    hit: bool  # it is what the caption has


def split_words(text, model, tokenizer):
    """Return the Phrase of a cleaned-up text, on the model's device, cut at the model's positions.

    BERT's pre-tokenizer splits words at blanks, and makes each symbol that clean-up keeps a word.
    """
    text = without_halves(text)
    limit = model.config["max_tokens"] or model.bert_config["max_position_embeddings"]
    encoding, pieces = tokenizer.backend_tokenizer.encode(text), {}
    for position, word in enumerate(encoding.word_ids[:limit]):
        if word is not None:
            pieces.setdefault(word, []).append(position)
    ids, words = encoding.ids[:limit], []
    for word, positions in pieces.items():
        start, end = encoding.word_to_chars(word)
        words.append(text[start:end] + UNKNOWN * (ids[positions[0]] == tokenizer.unk_token_id))
    ids = torch.tensor([ids], device=model.bert.embeddings.position_ids.device)
    return Phrase(text, Text(ids, torch.ones_like(ids)), words, list(pieces.values()))


def unknown_words(words):
    """Return a line on the words of a Phrase that the vocabulary lacks, in a list; [] where there
    are none.
    """
    lacking = ", ".join(word.removesuffix(UNKNOWN) for word in words if word.endswith(UNKNOWN))
    return [f"not in the vocabulary, all the same to the model: {lacking}"] if lacking else []


def join_pieces(heat, pieces):
    """Average heat maps of tokens [I, L, h, w] over the pieces of each word -> [I, W, h, w]."""
    return torch.stack([heat[:, positions].mean(dim=1) for positions in pieces], dim=1)


@torch.no_grad()
def _cross_attention_maps(model, image, phrase, block_num, score):
    """Return heat maps of score(fused [1, L, C]) on I images [I, 3, H, W]: of the whole text and by
    word; and the score.
    """
    image_embeds = model.visual_encoder.forward_features(image)
    keys_values = model.bert.image_keys_values(image_embeds)
    block_num = default_block(model, words=True) if block_num is None else block_num
    maps, value = cross_gradcam(model, keys_values, phrase.tokens, block_num, score)
    heat = torch.cat(maps)  # [I, L, h, w]
    return heat.mean(dim=1), join_pieces(heat, phrase.pieces), value


def explain_class(task, model, image, phrase, block_num=None):
    """Return the HeatMaps of the most probable class, in pre-training and retrieval of the class
    "match".

    model: in eval mode, of a task in HEADS; image [I, 3, H, W], two for pairs, else one; block_num:
    as cross_gradcam takes it.
    """
    head, names = HEADS[task]
    verdict = ""

    def score(fused):
        nonlocal verdict
        logits = getattr(model, head)(fused[0, 0])
        shown = 1 if head == "itm_head" else int(logits.argmax())
        verdict = f"{names[shown]} {100 * logits.softmax(dim=0)[shown].item():.1f}%"
        return logits[shown]

    whole, by_word, _ = _cross_attention_maps(model, image, phrase, block_num, score)
    return HeatMaps(whole, by_word, verdict)


@torch.no_grad()
def explain_similarity(model, image, phrase, block_num=None):
    """Return the HeatMaps, without words, of the contrastive similarity on a block of the ViT, by
    default the last.

    model: of pre-training or retrieval, in eval mode; image [1, 3, H, W].
    """
    block_num = default_block(model, "itc") if block_num is None else block_num
    heat = itc_gradcam(model, image, phrase.tokens, block_num)
    similarity = feature_similarity(
        model.encode_image(image)[1], model.encode_text(phrase.tokens)[1]
    ).item()
    return HeatMaps(heat, heat.new_zeros(1, 0, *heat.shape[1:]), f"similarity {similarity:.3f}")


def find_answer(model, image, phrase, answers, tokenizer):
    """Return the most probable answer of a list, without a list the one that beam search finds, and
    its token ids [1, L'].

    model: of VQA, in eval mode; image [1, 3, H, W]. The ids begin with [CLS] and end with eos.
    """
    if answers:
        tokens = tokenize_answers(answers, model, tokenizer)
        (((answer, _), *_),) = answer_questions(
            model, image, phrase.tokens, answers, tokens, tokenizer
        )
        return answer, tokenize_answers([answer], model, tokenizer).input_ids
    (ids,), _ = model.generate(image, phrase.tokens, model.config["num_beams"])
    special = model.special_ids
    return tokenizer.decode(ids), torch.tensor(
        [[special.cls, *ids, special.eos]], device=image.device
    )


def explain_answer(model, image, phrase, answers, tokenizer, block_num=None):
    """Return the HeatMaps of the log p of an answer's tokens, the answer of find_answer.

    Arguments as there.
    """
    answer, ids = find_answer(model, image, phrase, answers, tokenizer)

    def score(fused):
        states = model.text_decoder.bert.image_keys_values(fused), phrase.tokens.attention_mask
        log_probs = model.answer_logits(states, ids, ids.new_zeros(1)).log_softmax(
            dim=-1
        )  # [1, L'-1, V]
        return log_probs.gather(2, ids[:, 1:, None]).sum()

    whole, by_word, log_prob = _cross_attention_maps(model, image, phrase, block_num, score)
    return HeatMaps(whole, by_word, f"answer: {answer or '(empty)'}, log p {log_prob:.2f}")


@torch.no_grad()
def word_targets(model, image_embeds, phrase, tokenizer):
    """Return the momentum model's candidates for each word of a caption, with all pieces of the
    word masked.

    model: of pre-training, in eval mode; image_embeds [1, 1+N, C]: of the momentum image encoder.
    The first piece is predicted. Returns for each word a list of TOP Candidates, the most probable
    first.
    """
    ids, rows = phrase.tokens.input_ids, len(phrase.words)
    masked, mask = ids.repeat(rows, 1), phrase.tokens.attention_mask.expand(rows, -1)
    for row, positions in zip(masked, phrase.pieces):
        row[positions] = model.special_ids.mask
    bert = model.bert_m
    # [W, L, C]
    fused = bert.fuse(bert.encode_text(masked, mask), mask, bert.image_keys_values(image_embeds))
    first = torch.tensor([positions[0] for positions in phrase.pieces], device=ids.device)
    hidden = fused[torch.arange(rows, device=ids.device), first]
    # [W, TOP]
    probs, best = model.text_encoder_m.cls.predictions(hidden).softmax(dim=1).topk(TOP, dim=1)
    return [
        [Candidate(tokenizer.convert_ids_to_tokens(i), p, i == true) for i, p in zip(*candidates)]
        for true, *candidates in zip(ids[0, first].tolist(), best.tolist(), probs.tolist())
    ]


@torch.no_grad()
def text_targets(model, image_feat, texts, caption, tokenizer):
    """Return the TOP texts of a list that the momentum model finds most similar to an image, a list
    of Candidates.

    model: of pre-training, in eval mode; image_feat [1, D]: of the momentum image encoder; texts:
    cleaned up, none twice.
    """
    similarities = []
    for start in tqdm(range(0, len(texts), BATCH), desc="texts", leave=False, disable=None):
        batch = texts[start : start + BATCH]
        limit = model.config["max_tokens"] or model.bert_config["max_position_embeddings"]
        tokens = tokenize(batch, tokenizer, limit).to(image_feat.device)
        similarities.append(
            feature_similarity(image_feat, model.encode_text(tokens, momentum=True)[1])[0]
        )
    values, best = torch.cat(similarities).topk(min(TOP, len(texts)))
    return [
        Candidate(texts[i], value, texts[i] == caption)
        for value, i in zip(values.tolist(), best.tolist())
    ]
