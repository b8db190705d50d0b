"""Hard negatives, masking and queues, by their statistics and edge cases."""

import pytest
import torch

from models.albef import SpecialIds
from models.losses import itm_loss, mask_tokens, sample_negatives
from models.momentum import enqueue_


def test_hard_negatives_follow_the_softmax_without_the_positives():
    torch.manual_seed(0)
    sim = torch.tensor(
        [[5.0, 1.0, 2.0, 0.0], [0.0, 9.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0], [0.5, 0.5, 0.5, 0.5]]
    )
    positives = torch.eye(4, dtype=torch.bool)
    positives[2, 3] = True  # another caption of the same image
    draws = 20000
    counts = torch.zeros(4, 4)
    for _ in range(draws // 100):
        index, valid = sample_negatives(sim.repeat(100, 1), positives.repeat(100, 1))
        assert valid.all()
        counts += torch.nn.functional.one_hot(index, 4).float().view(100, 4, 4).sum(dim=0)
    expected = sim.masked_fill(positives, -torch.inf).softmax(dim=1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert (counts[positives] == 0).all()
    assert ((counts / draws - expected).abs() <= 4.5 * deviation + 1e-9).all()


def test_row_without_a_negative_is_not_valid():
    positives = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    index, valid = sample_negatives(torch.zeros(3, 3), positives)
    assert valid.tolist() == [True, False, True]
    assert index[0] == 2 and index[2] == 0


def test_matching_is_the_mean_over_the_rows_with_a_negative():
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    pairs, labels = logits[[0, 2, 4]], torch.tensor([1, 0, 0])
    assert torch.isclose(
        itm_loss(logits, torch.tensor([True, False])),
        torch.nn.functional.cross_entropy(pairs, labels),
    )
    assert itm_loss(logits, torch.tensor([False, False])) == 0


@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_masking_rates_and_untouchable_tokens(probability):
    torch.manual_seed(0)
    special = SpecialIds(pad=0, cls=2, mask=4)
    input_ids = torch.randint(5, 1000, (400, 50))
    input_ids[:, 0] = special.cls
    input_ids[:, 40:] = special.pad
    masked = mask_tokens(input_ids, 1000, special, probability)
    chosen = masked.labels != -100
    assert not chosen[:, 0].any() and not chosen[:, 40:].any()
    words = 400 * 39
    assert abs(chosen.sum().item() / words - probability) < 0.015
    assert torch.equal(masked.labels[chosen], input_ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], input_ids[~chosen])
    became = masked.input_ids[chosen]
    is_mask, same = became == special.mask, became == input_ids[chosen]
    assert abs(is_mask.float().mean().item() - 0.8) < 0.03
    assert abs(same.float().mean().item() - 0.1) < 0.03
    assert torch.equal(masked.positions, chosen.flatten().nonzero().squeeze(1))


def test_queue_takes_any_batch_size():
    size, ptr = 7, torch.zeros(1, dtype=torch.long)
    queue = torch.zeros(2, size)
    history = []
    for batch in (3, 1, 5, 7, 2, 20, 4):
        rows = torch.arange(len(history), len(history) + batch).float()
        history += rows.tolist()
        enqueue_([queue], [torch.stack([rows, -rows], dim=1)], ptr)
        assert ptr.item() == len(history) % size
        newest = {t % size: value for t, value in enumerate(history)}
        assert queue[0].tolist() == [newest.get(slot, 0.0) for slot in range(size)]
        assert torch.equal(queue[1], -queue[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_stay_out_of_all_queues(bad):
    queues, ptr = [torch.zeros(2, 4), torch.zeros(1, 4)], torch.zeros(1, dtype=torch.long)
    rows = torch.ones(3, 2)
    rows[1, 0] = bad
    enqueue_(queues, [rows, torch.ones(3, 1)], ptr)
    assert (
        queues[0].tolist() == [[1, 0, 1, 0]] * 2
        and queues[1].tolist() == [[1, 0, 1, 0]]
        and ptr.item() == 3
    )
