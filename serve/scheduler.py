"""Which tokens are computed next: fair admission, chunked prefill, preemption, order by adapter. No tensors.

Counts and names only, so policy is tested in milliseconds. One thread owns a Scheduler.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from serve.engine import AdapterScale
from serve.fairness import FairShare, Group, group_of
from serve.kv_blocks import BlockPool, Sequence

__all__ = ["AdapterMix", "Batch", "BlockPool", "Piece", "Scheduler", "SchedulerLimits", "Sequence"]

AdapterMix = tuple[AdapterScale, ...]


@dataclass(frozen=True)
class Piece:
    """`num_tokens` tokens of one sequence, from position `start`, computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Does the step reach the end of the sequence, so that a next token comes of it?"""


@dataclass(frozen=True)
class Batch:
    """The pieces of one step, those of one adapter mix side by side, the bare base last."""

    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)


@dataclass(frozen=True)
class SchedulerLimits:
    max_num_seqs: int = 32
    """sequences that run together"""
    max_batch_tokens: int = 512
    """tokens computed in one step"""
    max_prefill_chunk: int = 256
    """prompt tokens of all sequences in a step, so that decoding never waits longer than this"""
    max_wait_steps: int = 16
    """steps after which a group of which nothing runs takes the place of a better served one"""


class Scheduler:
    """Fair between groups (one per adapter mix, and the bare base), first come first served within one.

    The group that was served least comes first, for a free place and for the prompt tokens of a step. A group of which
    nothing runs gets a place within `max_wait_steps`, as long as there are no more groups than places; with more they
    take turns. When KV blocks run out, the newest sequence of the best served group gives its blocks back and is
    computed again later.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._share = FairShare()
        self._queues: dict[Group, deque[Sequence]] = {}
        self._waits_since: dict[Group, int] = {}
        """step at which a group began to have requests but nothing running"""
        self._step = 0

    @property
    def waiting(self) -> list[Sequence]:
        return [sequence for queue in self._queues.values() for sequence in queue]

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, sequence: Sequence) -> None:
        group = group_of(sequence.request)
        active = {*self._queues, *self._running_groups()}
        if group not in active:
            self._share.join(group, active)
        self._enqueue(sequence, group)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free at once."""
        group = group_of(sequence.request)
        if sequence in self.running:
            self.running.remove(sequence)
            self._note_waiting(group)
        elif sequence in self._queues.get(group, ()):
            self._queues[group].remove(sequence)
            self._forget_if_empty(group)
        self.pool.release(sequence)

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is nothing to do."""
        self._step += 1
        self._seat_overdue()
        pieces = self._decode_pieces()
        room = self.limits.max_batch_tokens - len(pieces)
        pieces += self._prefill_pieces(min(room, self.limits.max_prefill_chunk))
        if not pieces:
            return None
        return Batch(tuple(sorted(pieces, key=_mix_order)))

    def commit(self, batch: Batch, sampled: dict[str, int]) -> None:
        """Record that the batch was computed; `sampled` is request id -> next token of pieces that sample."""
        for piece in batch.pieces:
            sequence = piece.sequence
            if not sequence.blocks:
                continue  # removed while the step ran
            sequence.num_computed = piece.start + piece.num_tokens
            self.pool.keep(sequence)
            if piece.samples:
                sequence.tokens.append(sampled[sequence.request.id])

    def check(self) -> None:
        """The books: blocks, places, and who waits since when."""
        waiting = self.waiting
        self.pool.check([*self.running, *waiting])
        assert not any(sequence.blocks for sequence in waiting), "a waiting sequence holds KV blocks"
        assert len(self.running) <= self.limits.max_num_seqs, "more sequences run than allowed"
        assert self._waits_since.keys() == self._queues.keys() - self._running_groups().keys(), "a group is forgotten"

    def _running_groups(self) -> Counter[Group]:
        return Counter(group_of(sequence.request) for sequence in self.running)

    def _enqueue(self, sequence: Sequence, group: Group, *, first: bool = False) -> None:
        queue = self._queues.setdefault(group, deque())
        if first:
            queue.appendleft(sequence)
        else:
            queue.append(sequence)
        self._note_waiting(group)

    def _note_waiting(self, group: Group) -> None:
        if group in self._queues and group not in self._running_groups():
            self._waits_since.setdefault(group, self._step)

    def _forget_if_empty(self, group: Group) -> None:
        if not self._queues[group]:
            del self._queues[group]
            self._waits_since.pop(group, None)

    def _seat_overdue(self) -> None:
        """Give a place to each group that has waited too long, at the cost of those that were served more."""
        limit = self._step - self.limits.max_wait_steps
        overdue = sorted((since, group) for group, since in self._waits_since.items() if since <= limit)
        seated: list[Sequence] = []
        for _, group in overdue:
            sequence = self._queues[group][0]
            while not self._admit(sequence):
                others = [s for s in self.running if s not in seated and group_of(s.request) != group]
                victim = self._best_served(others)
                if victim is None or self._served(victim) < self._share.served(group):
                    return
                self._preempt(victim)
            seated.append(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Move the first of its group's queue to the running ones, if there is a place and room for it."""
        if len(self.running) >= self.limits.max_num_seqs or not self.pool.can_admit(sequence):
            return False
        group = group_of(sequence.request)
        self._queues[group].popleft()
        self._waits_since.pop(group, None)
        self._forget_if_empty(group)
        self.pool.admit(sequence)
        if not sequence.num_charged:
            sequence.num_shared = sequence.num_charged = sequence.num_computed
        self.running.append(sequence)
        return True

    def _decode_pieces(self) -> list[Piece]:
        pieces = []
        for sequence in list(self.running):
            if sequence.num_pending != 1 or sequence not in self.running:
                continue
            if self._make_room(sequence, len(sequence.tokens)):
                pieces.append(self._chunk(sequence, 1))
        # A sequence may have been preempted after its piece was made.
        return [piece for piece in pieces if piece.sequence in self.running]

    def _prefill_pieces(self, budget: int) -> list[Piece]:
        pieces: list[Piece] = []
        done = {id(sequence) for sequence in self.running if sequence.num_pending == 1}
        may_admit = True
        while budget > 0:
            begun = [s for s in self.running if id(s) not in done]
            heads = [queue[0] for queue in self._queues.values()] if may_admit else []
            if not begun and not heads:
                break
            sequence = min([*begun, *heads], key=self._served)
            if sequence not in self.running and not self._admit(sequence):
                may_admit = False  # nobody overtakes it: what becomes free is for the least served
                continue
            pieces.append(self._chunk(sequence, budget))
            done.add(id(sequence))
            budget -= pieces[-1].num_tokens
        return pieces

    def _chunk(self, sequence: Sequence, budget: int) -> Piece:
        num_tokens = min(sequence.num_pending, budget)
        end = sequence.num_computed + num_tokens
        samples = end == len(sequence.tokens)
        new = max(0, end - sequence.num_charged)
        is_input = end <= len(sequence.request.prompt)
        self._share.charge(sequence.request, num_input=new if is_input else 0, num_output=int(samples))
        sequence.num_charged += new
        return Piece(sequence, sequence.num_computed, num_tokens, samples)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` blocks for `num_tokens`, preempting others; False if it had to go itself."""
        while not self.pool.can_grow(sequence, num_tokens):
            victim = self._best_served(self.running)
            assert victim is not None
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(sequence, num_tokens)
        return True

    def _served(self, sequence: Sequence) -> float:
        return self._share.served(group_of(sequence.request))

    def _best_served(self, sequences: list[Sequence]) -> Sequence | None:
        """The newest sequence of the group that was served most."""
        return max(reversed(sequences), key=self._served, default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        self._enqueue(sequence, group_of(sequence.request), first=True)
        self.num_preemptions += 1


def _mix_order(piece: Piece) -> tuple[bool, tuple[tuple[str, float], ...]]:
    mix = piece.sequence.request.adapters
    return (not mix, tuple((adapter.digest, adapter.scale) for adapter in mix))
