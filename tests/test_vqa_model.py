"""The VQA model against the released implementation's numbers, and its ranking and generation
against their plain forms.
"""

import pytest
import torch
from conftest import assert_close, assert_released_step
from helpers import plain

import models.vqa
from utils import Text


@pytest.fixture
def step(released):
    """(golden values, function that builds the model with more keys, the arguments of a step)."""
    data, _, question = released("vqa")
    inputs = {name: data[name] for name in ("image", "n", "weights", "alpha")}
    inputs["answer"] = Text(data["answer_input_ids"], data["answer_attention_mask"])
    return data, lambda **keys: released("vqa", **keys)[1], {**inputs, "question": question}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_gradients_and_state_are_the_released_ones(step, checkpointing):
    data, build, inputs = step
    model = build(gradient_checkpointing=checkpointing)
    assert model.text_decoder.bert.gradient_checkpointing == checkpointing
    assert_released_step(model, model.losses(**inputs), data)


def test_loss_without_distillation_is_the_released_one(step):
    data, build, inputs = step
    model = build(distill=False)
    assert not any("_m." in name for name in model.state_dict())
    loss, released = model.losses(**inputs)["loss"].detach(), torch.tensor(data["loss_no_distill"])
    assert_close("loss", loss, released, 1e-4, 1e-5)


def test_ranking_is_the_released_one(step):
    data, build, inputs = step
    answers = Text(data["answer_list_input_ids"], data["answer_list_attention_mask"])
    model, question = build().eval(), inputs["question"]
    ids, probs = model.rank_answers(data["image"], question, answers, data["k_test"])
    assert torch.equal(ids, data["topk_ids"])
    assert_close("topk_probs", probs, data["topk_probs"], 1e-4, 1e-5)


def random_answers(count, longest):
    """Answers of all lengths that often begin alike: [CLS], tokens, eos, padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, longest + 1, (count,), generator=generator)
    ids = torch.randint(4, 8, (count, longest), generator=generator)
    places = torch.arange(longest)
    ids[:, 0], mask = 2, places < lengths[:, None]
    ids = ids.masked_fill(places == lengths[:, None] - 1, 3).masked_fill(~mask, 0)
    distinct = ids.unique(dim=0)
    return Text(distinct, (places < (distinct != 0).sum(dim=1, keepdim=True)).long())


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("k", [1, 7, 1000])
def test_ranking_equals_the_plain_form(step, monkeypatch, k, on_host):
    monkeypatch.setattr(models.vqa, "computes_on_host", lambda image: on_host)
    monkeypatch.setattr(models.vqa, "PASS_ROWS", 13)
    data, build, inputs = step
    model, answers = build().eval(), random_answers(60, 7)
    ids, probs = model.rank_answers(data["image"], inputs["question"], answers, k)
    plain_ids, plain_probs = plain.rank_answers(
        model, data["image"], inputs["question"], answers, k
    )
    assert ids.shape == (2, min(k, len(answers.input_ids)))
    assert_close("probabilities", probs, plain_probs, 1e-4, 1e-5)
    assert torch.equal(ids, plain_ids)


@torch.no_grad()
# with the bias the most probable answer ends before the others
@pytest.mark.parametrize("eos_bias", [0, 3])
def test_wide_beams_find_the_most_probable_answer_and_one_beam_is_greedy(step, eos_bias):
    data, build, inputs = step
    model, vocab = build().eval(), 61
    model.text_decoder.cls.predictions.bias[3] += eos_bias
    model.special_ids = model.special_ids._replace(cls=2, eos=3)
    states = model.encode_question(data["image"], inputs["question"])
    ids = torch.tensor([[2, first, 0] for first in range(vocab)])
    log_probs = model.answer_logits(states, ids, torch.zeros(vocab, dtype=torch.long)).log_softmax(
        -1
    )
    scores = log_probs[:1, 0].T + log_probs[:, 1]  # of all answers of two tokens to one question
    scores[3], scores[3, 3] = float("-inf"), log_probs[0, 0, 3]  # nothing follows the end
    best = [token for token in divmod(scores.argmax().item(), vocab) if token != 3]
    assert (
        model.generate(data["image"], inputs["question"], beams=vocab, max_length=2)[0][0] == best
    )

    greedy = []
    while len(greedy) < 4 and 3 not in greedy:
        ids = torch.tensor([[2, *greedy, 0]])
        greedy.append(model.answer_logits(states, ids, torch.tensor([0]))[0, -1].argmax().item())
    assert model.generate(data["image"], inputs["question"], beams=1, max_length=4)[0][0] == [
        t for t in greedy if t != 3
    ]
