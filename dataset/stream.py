"""Pre-training data read in sequence, from shards and JSON lists, exactly once an epoch on any number of processes.

An epoch is a sequence of positions 0..N-1: all units one after another in an order drawn for the epoch, where a shard is a
unit, and so is every UNIT entries of the JSON lists, which are permuted first. `parts` are the segments of positions that
are still to do, as an int64 array [S, 2] of starts and ends, sorted; N samples on W processes with L lanes (data workers) and
a batch size b make B = N // (b W) batches for each process. Batch number k comes from lane k % L. The samples of the lanes,
lane after lane and process after process, are the first B b W of the parts, so every lane reads its share of the shards from
start to end. It does so by windows of at most `buffer` samples, each of which it reads whole and hands out in random order.

All this is a function of (seed, epoch, what was done), which is known of every process, so a run can continue an epoch on
other processes with the very samples that have not been seen.
"""

import functools
import itertools
import operator

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dataset.batches import Phase, check_length, continued
from dataset.caption import Sample, caption_batch, draw_caption
from dataset.images import decode_image
from dataset.samples import first_usable, seed_sample
from dataset.shards import image_and_captions, read_shard
from utils import InputError, seed_of

UNIT = 1000  # entries of the JSON lists that stay together


class Stream(IterableDataset):
    """The samples of one data worker of one process: dataset.caption.Sample, as CaptionDataset gives them.

    captions: CaptionDataset of the JSON lists, or None. shards: [(path, number of samples), ...], as count_shards gives them.
    transform: for the images of shards. buffer: samples a lane mixes, whose compressed bytes it holds in memory. lanes: data
    workers of a process, 1 where it reads its data itself.
    Raises InputError if there is less than one batch.

    What a position gives depends on (seed, epoch, position) alone. A sample that cannot be used is replaced by another one of
    its window.
    """

    def __init__(self, captions, shards, transform, seed, max_tokens, buffer, batch_size, rank, world_size, lanes):
        self.captions, self.shards, self.transform, self.seed = captions, shards, transform, seed
        self.max_tokens, self.buffer, self.rank = max_tokens, buffer, rank
        self.layout = Phase(0, batch_size, world_size, lanes)
        entries = len(captions) if captions else 0
        pieces = [min(UNIT, entries - start) for start in range(0, entries, UNIT)]
        self._sizes = np.array([count for _, count in shards] + pieces, np.int64)
        check_length(len(self), batch_size, world_size)
        self.begin(0)

    def __len__(self):
        return int(self._sizes.sum())

    def begin(self, epoch, history=()):
        """Makes the next iteration that of an epoch, without what history, the Phases of it that are done, has used.

        Where the last of them had the present layout, its batches continue as if they had never been interrupted. To be called
        where data workers are started from: they share the order that is drawn here.
        Raises InputError if the epoch cannot have had so many batches.
        """
        self.epoch = epoch
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        self._units = torch.randperm(len(self._sizes), generator=generator).tolist()
        self._starts = np.concatenate([[0], np.cumsum(self._sizes[self._units])])
        entries = len(self.captions) if self.captions else 0
        dtype = torch.int32 if entries < 2**31 else torch.int64
        self._entries = torch.randperm(entries, generator=generator, dtype=dtype).numpy()

        phases = functools.reduce(continued, (phase for phase in history if phase.batches), [])
        present = bool(phases) and phases[-1]._replace(batches=0) == self.layout
        self._done = phases.pop().batches if present else 0
        self._parts = np.array([[0, len(self)]])
        for phase in phases:
            self._parts = remaining(self._parts, phase, self.seed, epoch, self.buffer)
        _check_done(self._done, self._parts, self.layout)

    @property
    def batches(self):
        """Batches that are left of the epoch for each process."""
        return _batches(self._parts, self.layout) - self._done

    def collate(self, samples, tokenizer):
        """Samples -> CaptionBatch."""
        return caption_batch(samples, tokenizer, self.max_tokens)

    def __iter__(self):
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if workers != self.layout.lanes:
            raise ValueError(f"a Stream of {self.layout.lanes} lanes is read by {workers} data workers")
        # a DataLoader asks worker 0 for its first batch, and the first of those left need not be of lane 0
        lane = (self._done + number) % workers
        segments = _lane(self._parts, self.layout, self.rank, lane)
        done = _batches_of_lane(self._done, self.layout, lane) * self.layout.batch_size
        windows = _windows(_size(segments), done, self.buffer)
        items = self._read(_cut(segments, windows[0][0], _size(segments))) if windows else iter(())
        for start, end in windows:
            yield from self._shuffled(list(itertools.islice(items, end - start)), max(0, done - start))

    def _read(self, segments):
        """Yields (position, shard, sample as in the shard), or (position, None, entry of the lists), of segments in order."""
        for number, pieces in itertools.groupby(self._pieces(segments), key=operator.itemgetter(0)):
            unit, first = self._units[number], int(self._starts[number])
            positions = [position for _, start, end in pieces for position in range(start, end)]
            if unit < len(self.shards):
                path, _ = self.shards[unit]
                samples = read_shard(path, (position - first for position in positions))
                yield from ((position, path, sample) for position, sample in zip(positions, samples))
            else:
                before = (unit - len(self.shards)) * UNIT
                yield from ((position, None, int(self._entries[before + position - first])) for position in positions)

    def _pieces(self, segments):
        """Yields (number of the unit in the epoch's order, start, end): segments cut where units begin."""
        for start, end in segments.tolist():
            while start < end:
                number = int(np.searchsorted(self._starts, start, side="right")) - 1
                stop = min(end, int(self._starts[number + 1]))
                yield number, start, stop
                start = stop

    def _shuffled(self, window, skip):
        """Yields the samples of a window, items of `_read`, in random order without the first `skip`."""
        for i in _order(self.seed, self.epoch, window[0][0], len(window))[skip:]:
            seed_sample(self.seed, self.epoch, window[i][0])
            yield first_usable(lambda other: self._decode(*window[other][1:]), i, len(window))

    def _decode(self, shard, sample):
        if shard is None:
            return self.captions.read(sample)
        key = sample["__key__"]
        where = f"{shard}: sample {key}"
        image, captions = image_and_captions(sample, where)
        caption = draw_caption(captions, where)
        return Sample(self.transform(decode_image(image, where)), caption, -1, f"{shard}/{key}")


def remaining(parts, phase, seed, epoch, buffer):
    """The parts that are left after a Phase: of every lane what it has not handed out, and what was too little for a batch.

    Raises InputError if the parts are too few for the phase.
    """
    _check_done(phase.batches, parts, phase)
    used = _batches(parts, phase) * phase.batch_size * phase.world_size
    left = [_cut(parts, used, _size(parts))]
    for rank, lane in itertools.product(range(phase.world_size), range(phase.lanes)):
        segments = _lane(parts, phase, rank, lane)
        done = _batches_of_lane(phase.batches, phase, lane) * phase.batch_size
        if windows := _windows(_size(segments), done, buffer):
            start, end = windows[0]
            window = np.concatenate([np.arange(*segment) for segment in _cut(segments, start, end)])
            rest = window[_order(seed, epoch, int(window[0]), len(window))[done - start :]]
            left += [np.stack([rest, rest + 1], 1), _cut(segments, end, _size(segments))]
    left = np.concatenate(left)
    left = left[left[:, 0].argsort()]
    joins = left[1:, 0] == left[:-1, 1]
    return np.stack([left[np.append(True, ~joins), 0], left[np.append(~joins, True), 1]], 1) if len(left) else left


def _check_done(batches, parts, layout):
    if batches > _batches(parts, layout):
        raise InputError(f"train_file has too few samples for the {batches} batches that the checkpoint says were done of the "
                         f"{_size(parts)} samples left then: restore the data that the epoch began with")


def _size(segments):
    return int((segments[:, 1] - segments[:, 0]).sum())


def _cut(segments, start, end):
    """Of the samples of segments one after another, those number start..end-1, as segments."""
    ends = np.cumsum(segments[:, 1] - segments[:, 0])
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, end)
    cut = segments[first : last + 1].copy()
    if len(cut):
        cut[-1, 1] -= ends[last] - end
        cut[0, 0] = segments[first, 1] - (ends[first] - start)
    return cut[cut[:, 0] < cut[:, 1]]


def _batches(parts, layout):
    """Batches of each process."""
    return _size(parts) // (layout.batch_size * layout.world_size)


def _batches_of_lane(batches, layout, lane):
    """How many of a process's first batches are of that lane."""
    return len(range(lane, batches, layout.lanes))


def _lane(parts, layout, rank, lane):
    """The segments that a lane of a process goes through."""
    batches = _batches(parts, layout)
    before = batches * rank + sum(_batches_of_lane(batches, layout, other) for other in range(lane))
    end = before + _batches_of_lane(batches, layout, lane)
    return _cut(parts, before * layout.batch_size, end * layout.batch_size)


def _windows(size, done, buffer):
    """(start, end) of the windows of a lane of `size` samples that are not done, the first of them perhaps in part.

    They are as long as one another, give or take one: in a short one there might be no sample to replace a broken one.
    """
    count = max(1, -(-size // buffer))
    bounds = [size * i // count for i in range(count + 1)]
    return [(start, end) for start, end in itertools.pairwise(bounds) if end > done]


def _order(seed, epoch, first, length):
    """The order in which the samples of a window are handed out; first: its first position."""
    # the 1 keeps its draws apart from those of the sample at this position
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(seed, epoch, first, 1))).numpy()
