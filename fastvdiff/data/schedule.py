"""Which clips form which batch: a function of the seed and the step, so that a run resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


def epoch_order(seed: int, epoch: int, n: int) -> torch.Tensor:
    """The order in which epoch `epoch` visits `n` items: a permutation, int64 (n,), of (seed, epoch, n) only."""
    for name, value in (("seed", seed), ("epoch", epoch), ("n", n)):
        if value < 0:
            raise ValueError(f"epoch_order: {name}: expected at least 0, got {value}")
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


class BatchSchedule:
    """Batches of `n` items, shuffled anew each epoch; the items left over at an epoch's end are dropped.

    ```python
    epoch, position = divmod(step, n // batch_size)
    batch = epoch_order(seed, epoch, n)[position * batch_size :][:batch_size]
    ```

    There is no state to save: a resumed run asks for its step. For worker processes, hand the (epoch, index) keys to
    torch's loader: `DataLoader(videos, batch_sampler=schedule.keys(first_step, last_step), collate_fn=collate)`.

    Args:
        n: number of items.
        batch_size: at most n.
        seed: not negative.
    """

    def __init__(self, n: int, batch_size: int, seed: int = 0) -> None:
        if n < 1 or not 1 <= batch_size <= n:
            raise ValueError(f"BatchSchedule: expected 1 <= batch_size <= n, got batch_size={batch_size} and n={n}")
        if seed < 0:
            raise ValueError(f"BatchSchedule: seed: expected at least 0, got {seed}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.batches_per_epoch = n // batch_size
        self._order = (-1, torch.empty(0, dtype=torch.int64))  # the last epoch asked for, and its order

    def epoch(self, step: int) -> int:
        """The epoch that step belongs to."""
        if step < 0:
            raise ValueError(f"BatchSchedule: step: expected at least 0, got {step}")
        return step // self.batches_per_epoch

    def batch(self, step: int) -> list[int]:
        """The item numbers of step's batch."""
        epoch = self.epoch(step)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.n))
        first = (step - epoch * self.batches_per_epoch) * self.batch_size
        return self._order[1][first : first + self.batch_size].tolist()

    def keys(self, first_step: int, last_step: int) -> Iterator[list[tuple[int, int]]]:
        """Yield the batches of steps `first_step` to `last_step` - 1 as (epoch, index) pairs."""
        for step in range(first_step, last_step):
            epoch = self.epoch(step)
            yield [(epoch, index) for index in self.batch(step)]
