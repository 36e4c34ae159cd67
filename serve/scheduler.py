"""Which tokens are computed next: admission, chunked prefill, preemption, order by adapter. No tensors.

Counts and names only, so policy is tested in milliseconds. One thread owns a Scheduler.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from serve.engine import AdapterScale, GenerationRequest

AdapterMix = tuple[AdapterScale, ...]


class BlockPool:
    """Numbered KV blocks of `block_size` tokens; who holds which is known to the sequences."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(reversed(range(num_blocks)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Is there room for `sequence` to hold `num_tokens` in all?"""
        return self.blocks_for(num_tokens) - len(sequence.blocks) <= len(self._free)

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        while len(sequence.blocks) < self.blocks_for(num_tokens):
            sequence.blocks.append(self._free.pop())

    def release(self, sequence: Sequence) -> None:
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far, and how many of them have keys and values in the cache."""

    request: GenerationRequest
    tokens: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: GenerationRequest) -> Sequence:
        return cls(request, list(request.prompt))

    @property
    def num_pending(self) -> int:
        """Tokens not computed yet: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.num_computed

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


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


class Scheduler:
    """First come, first served, with running requests before waiting ones.

    When KV blocks run out the newest running sequence gives its blocks back and is computed again later.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or aborted: its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.pool.release(sequence)

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is nothing to do."""
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
            if piece.samples:
                sequence.tokens.append(sampled[sequence.request.id])

    def check(self) -> None:
        """The books: every block is free or held once."""
        held = [block for sequence in (*self.running, *self.waiting) for block in sequence.blocks]
        assert len(held) == len(set(held)), "a KV block is held twice"
        assert self.pool.num_free + len(held) == self.pool.num_blocks, "a KV block is lost"

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
        pieces = []
        for sequence in [s for s in self.running if s.num_pending > 1]:
            if budget > 0:
                pieces.append(self._chunk(sequence, budget))
                budget -= pieces[-1].num_tokens
        while budget > 0 and self.waiting and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            # Room for one more token than known, so that a fresh admission is not preempted at once.
            if not self.pool.can_grow(sequence, len(sequence.tokens) + 1):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            self.pool.grow(sequence, len(sequence.tokens) + 1)
            pieces.append(self._chunk(sequence, budget))
            budget -= pieces[-1].num_tokens
        return pieces

    def _chunk(self, sequence: Sequence, budget: int) -> Piece:
        num_tokens = min(sequence.num_pending, budget)
        return Piece(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_pending)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` blocks for `num_tokens`, preempting the newest; False if it had to go itself."""
        while not self.pool.can_grow(sequence, num_tokens):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        self.pool.grow(sequence, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1


def _mix_order(piece: Piece) -> tuple[bool, tuple[tuple[str, float], ...]]:
    mix = piece.sequence.request.adapters
    return (not mix, tuple((adapter.digest, adapter.scale) for adapter in mix))
