"""Visual question answering (Section 5): the answer is generated, or chosen by its likelihood from
a list.
"""

import functools
from typing import Protocol

import torch
from torch import Tensor

from models.albef import ALBEF, check_objectives
from models.bert import BertModel
from models.decoder import AnswerDecoder
from models.losses import distilled_cross_entropy
from models.momentum import update_momentum_
from utils import InputError, Text

ANSWER_TOKENS = 10  # of a generated answer unless max_answer_tokens is set, as in the released code
# candidates that are decoded together: 1 GB of vocabulary logits for answers of 4 tokens
PASS_ROWS = 1024


def computes_on_host(tensor):
    """Whether the host computes: waiting is free there, and an operation costs what it computes
    rather than a launch.
    """
    return tensor.device.type == "cpu"


def length_buckets(lengths, questions, k):
    """How to decode k candidates of each question by length without looking at them: [(start, end,
    width)], widest first.

    lengths [A]: of all answers of the list, [CLS] and eos included. However the questions choose,
    of their candidates in the order of falling length those from `start` to `end` have at most
    `width` tokens.
    """
    lengths = lengths.cpu()
    # nothing follows the first token of a shorter one
    widths = torch.arange(int(lengths.max()), 2, -1)
    at_least = (lengths[:, None] >= widths).sum(dim=0)
    ends = [questions * min(k, count) for count in at_least.tolist()]
    return [
        (start, end, width)
        for start, end, width in zip([0, *ends], ends, widths.tolist())
        if start < end
    ]


class VQABatch(Protocol):
    """What `VQA.forward` reads of a batch of the data set."""

    image: Tensor  # [B, 3, H, W]
    question: Text  # [B, L]
    answer: Text  # [A, L'], the answers of all questions in order
    n: list[int]  # number of answers of each question
    weights: Tensor  # [A]


class VQA(ALBEF):
    """A question encoded with its image, and a decoder that attends to it; distilled if the
    configuration says so.
    """

    def __init__(self, config, tokenizer=None):
        super().__init__(config, BertModel, tokenizer)
        if tokenizer is not None:
            eos = tokenizer.convert_tokens_to_ids(config["eos"])
            if eos == tokenizer.unk_token_id:
                raise InputError(
                    f"eos is {config['eos']!r}, which is not a token of the vocabulary; the usual one is [SEP]"
                )
            self.special_ids = self.special_ids._replace(eos=eos)
        self.text_decoder = AnswerDecoder(self.bert_config)
        self.text_decoder.bert.gradient_checkpointing = self.bert.gradient_checkpointing
        longest = self.bert_config["max_position_embeddings"] - 1  # after [CLS]
        self.max_answer_tokens = config["max_answer_tokens"] or min(ANSWER_TOKENS, longest)
        if self.max_answer_tokens > longest:
            raise InputError(
                f"max_answer_tokens is {self.max_answer_tokens}, bert_config has max_position_embeddings for "
                f"{longest}: lower it"
            )
        if config["distill"]:
            check_objectives("distill", config["distill"], [])
            self.add_momentum("visual_encoder", "text_encoder", "text_decoder")

    def _question(self, visual_encoder, bert, decoder, image, question):
        """The keys and values of the questions' states for each layer of the decoder, and their
        attention_mask [B, L].
        """
        text_embeds = bert.encode_text(question.input_ids, question.attention_mask)
        keys_values = bert.image_keys_values(visual_encoder.forward_features(image))
        states = bert.fuse(text_embeds, question.attention_mask, keys_values)
        return decoder.bert.image_keys_values(states), question.attention_mask

    def encode_question(self, image, question):
        """What the decoder attends to: for each of its layers keys and values [B, h, L, d]; their
        mask [B, L].

        image [B, 3, H, W]; question with input_ids and attention_mask [B, L].
        """
        return self._question(self.visual_encoder, self.bert, self.text_decoder, image, question)

    def answer_logits(self, question, input_ids, rows, decoder=None):
        """Vocabulary logits [A, L-1, V] of the tokens that follow each but the last of input_ids
        [A, L].

        question: from encode_question; rows [A]: the question of each answer; decoder: text_decoder
        by default.
        """
        decoder = decoder or self.text_decoder
        keys_values, mask = question
        hidden, _ = decoder(input_ids[:, :-1], keys_values, mask, question=rows)
        return decoder.cls.predictions(hidden)

    def forward(
        self, batch: VQABatch, *, alpha: float, update_momentum: bool = True
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
        n: list[int] | Tensor,
        weights: Tensor,
        alpha: float = 0.4,
        update_momentum: bool = True,
    ) -> dict[str, Tensor]:
        """The loss of a step: over a question's answers the sum of weight times token losses, and
        of that the mean.

        image [B, 3, H, W]; question with input_ids and attention_mask [B, L]; answer the same with
        [A, L'], the answers of all questions in order; n: number of answers of each question;
        weights [A]; alpha: the weight of distillation.
        """
        # the question of each answer; without output_size the device would have to be waited for
        rows = torch.repeat_interleave(
            torch.as_tensor(n, device=image.device), output_size=len(answer.input_ids)
        )
        logits, logits_m = (
            self.answer_logits(self.encode_question(image, question), answer.input_ids, rows),
            None,
        )
        if self.config["distill"]:
            with torch.no_grad():
                if update_momentum:
                    update_momentum_(self, self.config["momentum"])
                decoder = self.text_decoder_m
                question_m = self._question(
                    self.visual_encoder_m, self.bert_m, decoder, image, question
                )
                logits_m = self.answer_logits(question_m, answer.input_ids, rows, decoder).flatten(
                    0, 1
                )
        is_token = answer.attention_mask[:, 1:].bool()
        labels = answer.input_ids[:, 1:].masked_fill(~is_token, -100)
        losses, _ = distilled_cross_entropy(logits.flatten(0, 1), labels.flatten(), logits_m, alpha)
        per_answer = (losses.view_as(labels) * is_token).sum(dim=1)
        return {"loss": (weights * per_answer).sum() / len(image)}

    @torch.no_grad()
    def rank_answers(self, image, question, answer_list, k):
        """The k answers of a list with the most probable first token, the likeliest first.

        image [B, 3, H, W]; question with input_ids and attention_mask [B, L]; answer_list the same
        with [A, L'], each answer beginning with [CLS] and ending with eos. As released, an answer's
        score is log p(first token) + sum of log p(all tokens), so that the first token counts
        twice. Returns indices and probabilities, the softmax of the k scores, both [B, min(k, A)].
        """
        k = min(k, len(answer_list.input_ids))
        lengths = answer_list.attention_mask.sum(dim=1)
        after_first = self._log_probs_by_prefix
        # the lengths are waited for here, before the device has anything else to do
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

    def _log_probs_by_prefix(self, ids, lengths, mask, keys_values, past):
        """Sum of log p of the tokens after the first of each question's candidates: ids [B, k, L],
        lengths [B, k] -> [B, k].

        Question by question and token by token, with the fewest operations: candidates that begin
        alike share a row, and what no candidate asks for is not computed: nothing after eos, and no
        [CLS], whose keys and values are the `past`.
        """
        totals = torch.zeros(lengths.shape, device=ids.device)
        for number, (own_ids, own_lengths, total) in enumerate(zip(ids, lengths, totals)):
            one = slice(number, number + 1)
            own_keys_values, own_past = (
                [(keys[one], values[one]) for keys, values in kv] for kv in (keys_values, past)
            )
            # of `own_past`, for each candidate
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
                    prefixes[:, -1:], own_keys_values, mask[one], own_past
                )
                logits = self.text_decoder.cls.predictions(hidden[:, 0])  # [P, V]
                total[alive] += (
                    logits[new_row, own_ids[alive, position + 1]] - logits.logsumexp(dim=1)[new_row]
                )
                row[alive] = new_row
        return totals

    def _log_probs_in_buckets(self, ids, lengths, mask, keys_values, past, buckets):
        """What _log_probs_by_prefix returns, with the fewest launches and without waiting for the
        device.

        The candidates of all questions go together, each whole, the longest first. buckets: from
        length_buckets.
        """
        # the question of each candidate
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
        flat_ids, flat_lengths = ids.flatten(0, 1), lengths.flatten()
        totals = torch.zeros(flat_lengths.shape, device=ids.device)
        by_length = flat_lengths.argsort(descending=True)
        for start, end, width in buckets:
            for part in by_length[start:end].split(PASS_ROWS):
                own, tokens = rows[part], flat_ids[part, 1:width]
                own_past = [(keys[own], values[own]) for keys, values in past]
                hidden, _ = self.text_decoder(tokens[:, :-1], keys_values, mask, own_past, own)
                logits = self.text_decoder.cls.predictions(hidden)  # [R, width - 2, V]
                log_probs = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(
                    dim=2
                )
                is_token = torch.arange(2, width, device=ids.device) < flat_lengths[part, None]
                totals[part] = (log_probs * is_token).sum(dim=1)
        return totals.view_as(lengths)

    @torch.no_grad()
    def generate(self, image, question, beams=1, max_length=None):
        """Generate answers of at most max_length tokens by beam search for the most probable
        sequence, greedy with one beam.

        image [B, 3, H, W]; question with input_ids and attention_mask [B, L]; max_length: default
        max_answer_tokens. Returns the list of each answer's token ids without [CLS] and eos, and
        the log p of each answer [B], summed over all its tokens.
        """
        keys_values, mask = self.encode_question(image, question)
        ids = self.special_ids
        batch, device = len(image), image.device
        tokens = torch.full((batch, 1, 1), ids.cls, device=device)  # [B, beams, length]
        scores, past = torch.zeros(batch, 1, device=device), None
        for _ in range(max_length or self.max_answer_tokens):
            rows = torch.arange(batch, device=device).repeat_interleave(tokens.shape[1])
            hidden, past = self.text_decoder(
                tokens[:, :, -1].reshape(-1, 1), keys_values, mask, past, rows
            )
            logits = self.text_decoder.cls.predictions(hidden[:, 0])
            log_probs = logits.log_softmax(dim=1).unflatten(0, (batch, -1))  # [B, beams, V]
            ended = tokens[:, :, -1] == ids.eos
            log_probs[ended] = -torch.inf
            log_probs[..., ids.eos].masked_fill_(ended, 0.0)  # an ended answer stays as it is
            totals = (scores[..., None] + log_probs).flatten(1)  # [B, beams * V]
            scores, best = totals.topk(min(beams, totals.shape[1]), dim=1)
            beam, token = best // log_probs.shape[2], best % log_probs.shape[2]
            tokens = torch.cat([tokens.take_along_dim(beam[..., None], 1), token[..., None]], dim=2)
            kept = (
                torch.arange(batch, device=device)[:, None] * log_probs.shape[1] + beam
            ).flatten()
            past = [(keys[kept], values[kept]) for keys, values in past]
            if (tokens[:, 0, -1] == ids.eos).all():  # no other beam can become more probable
                break
        best = tokens[:, 0, 1:].tolist()
        return [
            answer[: answer.index(ids.eos)] if ids.eos in answer else answer for answer in best
        ], scores[:, 0]
