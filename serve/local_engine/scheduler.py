"""Choose the tokens of each step: fair admission, chunked prefill, preemption, order by adapter. No tensors.

It works on counts and names only, so that policy is tested in milliseconds. One thread owns a Scheduler.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from serve.config import SchedulerLimits
from serve.engine import AdapterScale
from serve.local_engine.block_pool import BlockPool, Sequence
from serve.local_engine.fairness import FairShare, Group

__all__ = ["AdapterMix", "Batch", "BlockPool", "ScheduledChunk", "Scheduler", "SchedulerLimits", "Sequence"]

AdapterMix = tuple[AdapterScale, ...]


@dataclass(frozen=True)
class ScheduledChunk:
    """The scheduled part of a sequence: `num_tokens` tokens from position `start`, computed in this step."""

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    """Whether the chunk reaches the end of the sequence, so that its next token is sampled."""


@dataclass(frozen=True)
class Batch:
    """The chunks of one step, ordered by adapter mix, the bare base last."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Fair between groups (one per adapter, and the bare base), first come first served within one.

    The least served group comes first, for admission and for the prompt tokens of a step. A group that has requests
    and of which nothing was computed for `max_wait_steps` is starved. The longest starved group is served first, and
    its oldest request, if nothing of it was computed yet, preempts others for its place and KV blocks. So when a
    request comes to a group without others, its first prompt tokens are computed within max_wait_steps + n steps, n
    being the number of other groups that have requests then. A preempted sequence is admitted again in its group's
    turn; it preempts only sequences that were served more and have had a turn. Otherwise two sequences that do not fit
    together would compute their prompts over and over.

    When KV blocks run out, the newest sequence of the most served group is preempted: its blocks are freed, and it is
    computed again later.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._share = FairShare()
        self._queues: dict[Group, deque[Sequence]] = {}
        self._computed_at: dict[Group, int] = {}
        """Group with requests -> step at which a token of it was last computed, or its first request came.

        Groups of the same step are in the order in which they came.
        """
        self._step = 0

    @property
    def waiting(self) -> list[Sequence]:
        return [sequence for queue in self._queues.values() for sequence in queue]

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, sequence: Sequence) -> None:
        group = sequence.group
        if group not in self._queues:
            self._share.arrive(group, waiting=self._queues, running=self._running_groups())
        self._computed_at.setdefault(group, self._step)
        self._queues.setdefault(group, deque()).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a finished or aborted sequence and free its blocks."""
        group = sequence.group
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._queues.get(group, ()):
            self._queues[group].remove(sequence)
            self._forget_if_empty(group)
        if group not in self._queues and group not in self._running_groups():
            self._computed_at.pop(group, None)
        self.pool.release(sequence)

    def schedule(self) -> Batch | None:
        """Return the next step's batch, or None when there is nothing to do."""
        self._step += 1
        starved = self._starved()
        self._admit_starved(starved)
        chunks = self._decode_chunks(starved)
        room = self.limits.max_batch_tokens - len(chunks)
        chunks += self._prefill_chunks(min(room, self.limits.max_prefill_chunk), starved)
        for chunk in chunks:
            self._computed_at[chunk.sequence.group] = self._step
        if not chunks:
            return None
        return Batch(tuple(sorted(chunks, key=_mix_order)))

    def commit(self, batch: Batch, sampled: dict[str, int]) -> None:
        """Record that the batch was computed; `sampled` is request id -> next token, for chunks that sample.

        A sequence whose next token is chosen later is not scheduled until then.
        """
        for chunk in batch.chunks:
            sequence = chunk.sequence
            if not sequence.blocks:
                continue  # removed while the step ran
            sequence.num_computed = chunk.start + chunk.num_tokens
            self.pool.cache_full_blocks(sequence)
            if chunk.samples and sequence.request.id in sampled:
                sequence.tokens.append(sampled[sequence.request.id])

    def check(self) -> None:
        """Check the invariants of blocks, running sequences and waiting groups."""
        waiting = self.waiting
        self.pool.check([*self.running, *waiting])
        assert not any(sequence.blocks for sequence in waiting), "a waiting sequence has KV blocks"
        assert len(self.running) <= self.limits.max_running, "more sequences run than allowed"
        assert self._computed_at.keys() == self._queues.keys() | self._running_groups().keys(), "a group is forgotten"

    def _running_groups(self) -> Counter[Group]:
        return Counter(sequence.group for sequence in self.running)

    def _forget_if_empty(self, group: Group) -> None:
        if not self._queues[group]:
            del self._queues[group]
            self._share.leave(group)

    def _starved(self) -> list[Group]:
        """Return the groups of which nothing was computed for `max_wait_steps`, the longest starved first."""
        limit = self._step - self.limits.max_wait_steps
        decoding = {sequence.group for sequence in self.running if sequence.num_pending <= 1}
        late = [group for group, step in self._computed_at.items() if step <= limit and group not in decoding]
        return sorted(late, key=self._computed_at.__getitem__)

    def _admit_starved(self, starved: Listed[Group]) -> None:
        """Admit a sequence of each starved group that has none, as far as the step has prompt tokens for them."""
        budget = self.limits.max_prefill_chunk
        for number, group in enumerate(starved):
            begun = next((sequence for sequence in self.running if sequence.group == group), None)
            sequence = begun or self._queues[group][0]
            if begun is None:
                others = [s for s in self.running if s.group not in starved[:number]]
                if not sequence.is_fresh:
                    served = self._served(sequence)
                    others = [s for s in others if self._served(s) > served and self._has_had_its_turn(s)]
                victims = self._victims_for(sequence, others)
                if victims is None:
                    continue
                for victim in victims:
                    self._preempt(victim)
                self._admit(sequence)
            budget -= sequence.num_pending
            if budget <= 0:
                return

    def _victims_for(self, sequence: Sequence, candidates: Listed[Sequence]) -> list[Sequence] | None:
        """Return which of `candidates` to preempt so that `sequence` can be admitted; None when all are not enough.

        First those of groups that run several sequences, then the most served; of a group, the newest.
        """
        chosen: list[Sequence] = []
        while not self._has_room(sequence, without=chosen):
            left = [s for s in self.running if s not in chosen]
            counts = Counter(s.group for s in left)
            victim = max(
                (s for s in reversed(left) if s in candidates),
                key=lambda s: (counts[s.group] > 1, self._served(s)),
                default=None,
            )
            if victim is None:
                return None
            chosen.append(victim)
        return chosen

    def _has_had_its_turn(self, sequence: Sequence) -> bool:
        """Return whether it has run twice as long as computing it again takes, plus `max_wait_steps`, with progress."""
        num_again = -(-len(sequence.tokens) // self.limits.max_prefill_chunk)
        num_steps = self._step - sequence.admitted_at
        is_further = sequence.num_computed >= sequence.num_charged
        return is_further and num_steps >= 2 * num_again + self.limits.max_wait_steps

    def _has_room(self, sequence: Sequence, *, without: Listed[Sequence] = ()) -> bool:
        has_place = len(self.running) - len(without) < self.limits.max_running
        return has_place and self.pool.can_admit(sequence, without=without)

    def _admit(self, sequence: Sequence) -> None:
        """Move the first sequence of its group's queue to the running ones; there is room for it."""
        self._queues[sequence.group].popleft()
        self._forget_if_empty(sequence.group)
        is_fresh = sequence.is_fresh
        self.pool.admit(sequence)
        sequence.admitted_at = self._step
        if is_fresh:
            sequence.num_cached_tokens = sequence.num_charged = sequence.num_computed
        self.running.append(sequence)

    def _decode_chunks(self, starved: Listed[Group]) -> list[ScheduledChunk]:
        for sequence in list(self.running):
            if sequence.num_pending == 1 and sequence in self.running:
                self._make_room(sequence, len(sequence.tokens), spared=starved)
        return [self._chunk(sequence, 1) for sequence in self.running if sequence.num_pending == 1]

    def _prefill_chunks(self, budget: int, starved: Listed[Group]) -> list[ScheduledChunk]:
        first = {group: number for number, group in enumerate(starved)}
        chunks: list[ScheduledChunk] = []
        done = {id(sequence) for sequence in self.running if sequence.num_pending <= 1}
        may_admit = True
        while budget > 0:
            begun = [s for s in self.running if id(s) not in done]
            heads = [queue[0] for queue in self._queues.values()] if may_admit else []
            if not begun and not heads:
                break
            urgent = [s for s in begun if s.group in first]
            if urgent:
                sequence = min(urgent, key=lambda s: first[s.group])
                del first[sequence.group]
            else:
                sequence = min([*begun, *heads], key=self._served)
            if sequence not in self.running:
                if not self._has_room(sequence):
                    may_admit = False  # none overtakes it: what becomes free is for the least served
                    continue
                self._admit(sequence)
            chunks.append(self._chunk(sequence, budget))
            done.add(id(sequence))
            budget -= chunks[-1].num_tokens
        return chunks

    def _chunk(self, sequence: Sequence, budget: int) -> ScheduledChunk:
        num_tokens = min(sequence.num_pending, budget) if self.limits.cuts_prompts else sequence.num_pending
        end = sequence.num_computed + num_tokens
        samples = end == len(sequence.tokens)
        new = max(0, end - sequence.num_charged)
        is_input = end <= len(sequence.request.prompt)
        self._share.charge(sequence.request, num_input=new if is_input else 0, num_output=int(samples))
        sequence.num_charged += new
        return ScheduledChunk(sequence, sequence.num_computed, num_tokens, samples)

    def _make_room(self, sequence: Sequence, num_tokens: int, *, spared: Listed[Group]) -> None:
        """Allocate blocks for `num_tokens` of `sequence`, preempting others that are not of `spared` groups, or it."""
        while not self.pool.can_grow(sequence, num_tokens):
            candidates = [s for s in reversed(self.running) if s is sequence or s.group not in spared]
            victim = self._most_served(candidates)
            self._preempt(victim)
            if victim is sequence:
                return
        self.pool.grow(sequence, num_tokens)

    def _most_served(self, newest_first: Listed[Sequence]) -> Sequence:
        """Return the newest sequence of the most served group."""
        return max(newest_first, key=self._served)

    def _served(self, sequence: Sequence) -> float:
        return self._share.served(sequence.group)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        self._queues.setdefault(sequence.group, deque()).appendleft(sequence)
        self.num_preemptions += 1


def _mix_order(chunk: ScheduledChunk) -> tuple[bool, tuple[tuple[str, float], ...]]:
    mix = chunk.sequence.request.adapters
    return (not mix, tuple((adapter.digest, adapter.scale) for adapter in mix))
