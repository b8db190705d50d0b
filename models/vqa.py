"""Visual question answering (Section 5): answers are ranked by likelihood, or generated."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from configs.config import Config
from models.albef import ALBEF, check_objectives
from models.bert import BertModel, KeysValues
from models.decoder import AnswerDecoder
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_
from models.tokenizer import Tokenizer
from utils import InputError, Text

if TYPE_CHECKING:
    from dataset.vqa import VQABatch

ANSWER_TOKENS = 10  # of a generated answer unless max_answer_tokens is set, as in the released code
# candidates that are decoded together: 1 GB of vocabulary logits for answers of 4 tokens
PASS_ROWS = 1024


class Question(NamedTuple):
    """States of questions fused with their images, the source of the decoder's cross-attention."""

    keys_values: list[KeysValues]  # of each layer of the decoder, [B, h, L, d] each
    mask: Tensor  # of the questions' tokens [B, L]


def computes_on_host(tensor: Tensor) -> bool:
    """Return whether the device is a CPU, where waiting and launching kernels cost nothing."""
    return tensor.device.type == "cpu"


def length_buckets(lengths: Tensor, questions: int, k: int) -> list[tuple[int, int, int]]:
    """Plan the decoding of any k candidates of each question by length.

    Sort all candidates by falling length. Then those from `start` to `end` have at most `width`
    tokens.

    Args:
        lengths: Number of tokens of each answer of the list [A], with [CLS] and eos.
        questions: Number of questions.
        k: Number of candidates of a question.

    Returns:
        (start, end, width) of each bucket, the widest first.
    """
    lengths = lengths.cpu()
    # no token follows the first one of an answer of 2 tokens
    widths = torch.arange(int(lengths.max()), 2, -1)
    at_least = (lengths[:, None] >= widths).sum(dim=0)
    ends = [questions * min(k, count) for count in at_least.tolist()]
    buckets = zip([0, *ends], ends, widths.tolist(), strict=False)  # the last end starts no bucket
    return [(start, end, width) for start, end, width in buckets if start < end]


class VQA(ALBEF):
    """Question encoder and answer decoder, with momentum copies if the configuration distills."""

    text_decoder_m: AnswerDecoder

    def __init__(self, config: Config, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, BertModel, tokenizer)
        if tokenizer is not None:
            eos = tokenizer.convert_tokens_to_ids(config.eos)
            if eos == tokenizer.unk_token_id:
                raise InputError(
                    f"eos is {config.eos!r}, which is not a token of the vocabulary; set"
                    " another token, usually [SEP]"
                )
            self.special_ids = self.special_ids._replace(eos=eos)
        self.text_decoder = AnswerDecoder(self.bert_config)
        self.text_decoder.bert.gradient_checkpointing = self.bert.gradient_checkpointing
        longest = self.bert_config.max_position_embeddings - 1  # after [CLS]
        self.max_answer_tokens = config.max_answer_tokens or min(ANSWER_TOKENS, longest)
        if self.max_answer_tokens > longest:
            raise InputError(
                f"max_answer_tokens is {self.max_answer_tokens}, but max_position_embeddings of"
                f" bert_config allows only {longest}; lower max_answer_tokens"
            )
        if config.distill:
            check_objectives("distill", config.distill, [])
            self.add_momentum("visual_encoder", "text_encoder", "text_decoder")

    def encode_question(self, image: Tensor, question: Text, momentum: bool = False) -> Question:
        """Encode questions with their images.

        Args:
            image: Images [B, 3, H, W].
            question: Questions [B, L].
            momentum: Whether to use the momentum model.
        """
        bert = self.bert_m if momentum else self.bert
        encoder = self.visual_encoder_m if momentum else self.visual_encoder
        decoder = self.text_decoder_m if momentum else self.text_decoder
        text_embeds = bert.encode_text(question.input_ids, question.attention_mask)
        keys_values = bert.image_keys_values(encoder.forward_features(image))
        states = bert.fuse(text_embeds, question.attention_mask, keys_values)
        return Question(decoder.bert.image_keys_values(states), question.attention_mask)

    def answer_logits(
        self,
        question: Question,
        input_ids: Tensor,
        rows: Tensor,
        decoder: AnswerDecoder | None = None,
    ) -> Tensor:
        """Compute vocabulary logits of the tokens that follow each but the last of the answers.

        Args:
            question: Questions, from `encode_question`.
            input_ids: Answers [A, L].
            rows: Question of each answer [A].
            decoder: Decoder, by default text_decoder.

        Returns:
            Logits [A, L-1, V].
        """
        decoder = decoder or self.text_decoder
        hidden, _ = decoder(input_ids[:, :-1], *question, question=rows)
        return decoder.cls.predictions(hidden)

    def forward(
        self, batch: "VQABatch", *, alpha: float, update_momentum: bool = True
    ) -> dict[str, Tensor]:
        """Return `losses` of a batch."""
        return self.losses(
            batch.image,
            batch.question,
            batch.answer,
            n=batch.n,
            weights=batch.weights,
            alpha=alpha,
            update_momentum=update_momentum,
        )

    def losses(
        self,
        image: Tensor,
        question: Text,
        answer: Text,
        *,
        n: Sequence[int] | Tensor,
        weights: Tensor,
        alpha: float = 0.4,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """Compute the mean over questions of the weighted sum of their answers' token losses.

        Args:
            image: Images [B, 3, H, W].
            question: Questions [B, L].
            answer: Answers [A, L'] of all questions in order.
            n: Number of answers of each question [B].
            weights: Weight of each answer [A].
            alpha: Weight of distillation.
            update_momentum: Whether to update the momentum model, once in an optimizer step.

        Returns:
            loss, a scalar.
        """
        # question of each answer; output_size avoids a wait for the device
        counts, total = torch.as_tensor(n, device=image.device), len(answer.input_ids)
        rows = torch.repeat_interleave(counts, output_size=total)
        states, logits_m = self.encode_question(image, question), None
        logits = self.answer_logits(states, answer.input_ids, rows)
        if self.config.distill:
            with torch.no_grad():
                if update_momentum:
                    update_momentum_(self, self.config.momentum)
                states = self.encode_question(image, question, momentum=True)
                logits_m = self.answer_logits(states, answer.input_ids, rows, self.text_decoder_m)
                logits_m = logits_m.flatten(0, 1)
        is_token = answer.attention_mask[:, 1:].bool()
        labels = answer.input_ids[:, 1:].masked_fill(~is_token, -100)
        losses, _ = distilled_cross_entropy(logits.flatten(0, 1), labels.flatten(), logits_m, alpha)
        per_answer = (losses.view_as(labels) * is_token).sum(dim=1)
        return {"loss": (weights * per_answer).sum() / len(image)}

    @torch.no_grad()
    def rank_answers(
        self, image: Tensor, question: Text, answer_list: Text, k: int
    ) -> tuple[Tensor, Tensor]:
        """Rank the k answers with the most probable first token.

        The score of an answer is log p(first token) + sum of log p(all tokens), as in the released
        code: the first token counts twice.

        Args:
            image: Images [B, 3, H, W].
            question: Questions [B, L].
            answer_list: Answers [A, L'], each from [CLS] to eos.
            k: Number of candidates of a question.

        Returns:
            Indices and probabilities, the softmax of the k scores, [B, min(k, A)] each, the
            likeliest first.
        """
        k = min(k, len(answer_list.input_ids))
        lengths = answer_list.attention_mask.sum(dim=1)
        after_first = self._log_probs_by_prefix
        # wait for the lengths here, before the device has other work
        if not computes_on_host(image):
            after_first = functools.partial(
                self._log_probs_in_buckets, buckets=length_buckets(lengths, len(image), k)
            )
        keys_values, mask = self.encode_question(image, question)
        start = answer_list.input_ids[:1, :1].expand(len(image), 1)
        hidden, past = self.text_decoder(start, keys_values, mask)
        probs = self.text_decoder.cls.predictions(hidden[:, 0]).softmax(dim=1)
        first, candidates = probs[:, answer_list.input_ids[:, 1]].topk(k, dim=1)  # [B, k]
        ids, lengths = answer_list.input_ids[candidates], lengths[candidates]
        scores = 2 * first.log() + after_first(ids, lengths, mask, keys_values, past)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order), scores.softmax(dim=1).gather(1, order)

    def _log_probs_by_prefix(
        self,
        ids: Tensor,
        lengths: Tensor,
        mask: Tensor,
        keys_values: Sequence[KeysValues],
        past: Sequence[KeysValues],
    ) -> Tensor:
        """Sum log p of the tokens after the first of each candidate, with the fewest operations.

        Question by question and token by token. Candidates with a common prefix share a row.

        Args:
            ids: Candidates [B, k, L].
            lengths: Number of their tokens [B, k].
            mask: Mask of the questions' tokens [B, Lq].
            keys_values: Keys and values of the questions.
            past: Keys and values of [CLS].

        Returns:
            Sums [B, k].
        """
        totals = torch.zeros(lengths.shape, device=ids.device)
        for number, (own_ids, own_lengths) in enumerate(zip(ids, lengths, strict=True)):
            one = slice(number, number + 1)
            own_keys_values, own_past = (
                [(keys[one], values[one]) for keys, values in kv] for kv in (keys_values, past)
            )
            # row of `own_past` of each candidate
            row = torch.zeros(len(own_ids), dtype=torch.long, device=ids.device)
            for position in range(1, ids.shape[2] - 1):
                alive = (own_lengths > position + 1).nonzero().squeeze(1)
                if not len(alive):
                    break
                prefixes, new_row = own_ids[alive, : position + 1].unique(
                    dim=0, return_inverse=True
                )
                parent = row.new_empty(len(prefixes)).index_copy_(0, new_row, row[alive])
                own_past = [(keys[parent], values[parent]) for keys, values in own_past]
                hidden, own_past = self.text_decoder(
                    prefixes[:, -1:], own_keys_values, mask[one], past=own_past
                )
                logits = self.text_decoder.cls.predictions(hidden[:, 0])  # [P, V]
                log_probs = logits[new_row, own_ids[alive, position + 1]]
                totals[number, alive] += log_probs - logits.logsumexp(dim=1)[new_row]
                row[alive] = new_row
        return totals

    def _log_probs_in_buckets(
        self,
        ids: Tensor,
        lengths: Tensor,
        mask: Tensor,
        keys_values: Sequence[KeysValues],
        past: Sequence[KeysValues],
        buckets: Sequence[tuple[int, int, int]],
    ) -> Tensor:
        """Compute what `_log_probs_by_prefix` does, with the fewest launches and no wait.

        The candidates of all questions are decoded together, the longest first, in the buckets of
        `length_buckets`.
        """
        # question of each candidate
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        flat_ids, flat_lengths = ids.flatten(0, 1), lengths.flatten()
        totals = torch.zeros(flat_lengths.shape, device=ids.device)
        by_length = flat_lengths.argsort(descending=True)
        for start, end, width in buckets:
            for part in by_length[start:end].split(PASS_ROWS):
                own, tokens = rows[part], flat_ids[part, 1:width]
                own_past = [(keys[own], values[own]) for keys, values in past]
                hidden, _ = self.text_decoder(
                    tokens[:, :-1], keys_values, mask, past=own_past, question=own
                )
                logits = self.text_decoder.cls.predictions(hidden)  # [R, width - 2, V]
                log_probs = logits.gather(2, tokens[:, 1:, None]).squeeze(2)
                log_probs = log_probs - logits.logsumexp(dim=2)
                is_token = torch.arange(2, width, device=ids.device) < flat_lengths[part, None]
                totals[part] = (log_probs * is_token).sum(dim=1)
        return totals.view_as(lengths)

    @torch.no_grad()
    def generate(
        self, image: Tensor, question: Text, beams: int = 1, max_length: int | None = None
    ) -> tuple[list[list[int]], Tensor]:
        """Generate answers by beam search for the most probable sequence.

        Args:
            image: Images [B, 3, H, W].
            question: Questions [B, L].
            beams: Number of beams, 1 for greedy search.
            max_length: Maximum number of tokens, by default max_answer_tokens.

        Returns:
            Token ids of each answer without [CLS] and eos, and log p of all its tokens [B].
        """
        keys_values, mask = self.encode_question(image, question)
        ids, batch, device = self.special_ids, len(image), image.device
        tokens = torch.full((batch, 1, 1), ids.cls, device=device)  # [B, beams, length]
        scores, past = torch.zeros(batch, 1, device=device), None
        numbers = torch.arange(batch, device=device)
        for _ in range(max_length or self.max_answer_tokens):
            hidden, past = self.text_decoder(
                tokens[:, :, -1].reshape(-1, 1),
                keys_values,
                mask,
                past=past,
                question=numbers.repeat_interleave(tokens.shape[1]),
            )
            logits = self.text_decoder.cls.predictions(hidden[:, 0])
            log_probs = logits.log_softmax(dim=1).unflatten(0, (batch, -1))  # [B, beams, V]
            ended = tokens[:, :, -1] == ids.eos
            log_probs[ended] = -torch.inf
            log_probs[..., ids.eos].masked_fill_(ended, 0.0)  # a finished answer does not change
            totals = (scores[..., None] + log_probs).flatten(1)  # [B, beams * V]
            scores, best = totals.topk(min(beams, totals.shape[1]), dim=1)
            beam, token = best // log_probs.shape[2], best % log_probs.shape[2]
            tokens = torch.cat([tokens.take_along_dim(beam[..., None], 1), token[..., None]], dim=2)
            kept = (numbers[:, None] * log_probs.shape[1] + beam).flatten()
            past = [(keys[kept], values[kept]) for keys, values in past]
            if (tokens[:, 0, -1] == ids.eos).all():  # no other beam can become more probable
                break
        answers = tokens[:, 0, 1:].tolist()
        return [answer[: (answer + [ids.eos]).index(ids.eos)] for answer in answers], scores[:, 0]
