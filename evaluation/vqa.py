"""Answers to questions about images: the likeliest of a list, or without one what beam search
finds.
"""

from dataset.text import tokenize


def tokenize_answers(answers, model, tokenizer):
    """The candidates of ranking, each of which ends with eos -> Text [A, L] on the model's device."""
    device = model.bert.embeddings.position_ids.device
    return tokenize([answer + model.config["eos"] for answer in answers], tokenizer).to(device)


def answer_questions(model, image, question, answers, tokens, tokenizer):
    """Return the answers to each question of a batch with their probabilities, [(text, p), ...],
    the best first.

    image [B, 3, H, W]; question with input_ids and attention_mask [B, L]; answers: the candidates;
    tokens: from tokenize_answers. The best k_test candidates are ranked, and p is their softmax.
    Without candidates one answer is generated with num_beams, and p is the probability of all its
    tokens.
    """
    if answers:
        best, probs = model.rank_answers(image, question, tokens, model.config["k_test"])
        return [
            [(answers[i], p) for i, p in zip(*row)] for row in zip(best.tolist(), probs.tolist())
        ]
    found, log_probs = model.generate(image, question, model.config["num_beams"])
    return [[(tokenizer.decode(ids), p)] for ids, p in zip(found, log_probs.exp().tolist())]
