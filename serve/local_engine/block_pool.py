"""KV blocks: block tables, reference counts and the prefix cache. No tensors.

A full block is cached under the digest of everything its keys and values depend on: the adapters with their scales, and
every token up to its end. So an adapter that is loaded again under the same name gets no blocks of the one before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from serve.engine import GenerationRequest
from serve.local_engine.fairness import Group, group_of


@dataclass(eq=False)
class Sequence:
    """A request in the engine: its tokens so far, and how many of them have keys and values in the KV cache."""

    request: GenerationRequest
    tokens: list[int]
    num_computed: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first admitted."""
    num_charged: int = 0
    """Tokens it was charged for; computing them again after a preemption is free."""
    admitted_at: int = 0
    """Step at which it was last admitted."""
    blocks: list[int] = field(default_factory=list)
    """Block table: numbers of its KV blocks, in order."""
    keys: list[bytes] = field(default_factory=list)
    """Prefix cache keys of its full blocks, as far as they were computed."""
    num_published: int = 0
    """Leading blocks already published to the prefix cache."""

    @classmethod
    def of(cls, request: GenerationRequest) -> Sequence:
        return cls(request, list(request.prompt))

    @cached_property
    def group(self) -> Group:
        return group_of(self.request)

    @property
    def is_fresh(self) -> bool:
        """Whether none of its tokens was computed for it, not even before a preemption."""
        return self.num_charged == self.num_cached_tokens

    @property
    def num_pending(self) -> int:
        """Number of tokens not computed yet: 1 in decoding, more in prefill, 0 until the next token is chosen."""
        return len(self.tokens) - self.num_computed

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def key(self, number: int, block_size: int) -> bytes:
        """Return the prefix cache key of full block `number`."""
        while len(self.keys) <= number:
            at = len(self.keys) * block_size
            before = self.keys[-1] if self.keys else repr(self.request.adapters).encode()
            tokens = array("q", self.tokens[at : at + block_size]).tobytes()
            self.keys.append(hashlib.blake2b(before + tokens, digest_size=16).digest())
        return self.keys[number]


class BlockPool:
    """Numbered blocks of `block_size` tokens. A free block keeps its cached content until it is needed."""

    def __init__(self, num_blocks: int, block_size: int, *, caches_prefixes: bool = True) -> None:
        """Make empty blocks; without `caches_prefixes`, they only count the memory of sequences."""
        self._caches_prefixes = caches_prefixes
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._empty = list(reversed(range(num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Free blocks with cached content, the least recently used first."""
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Return whether there are blocks for `sequence` to grow to `num_tokens` in all."""
        return self.blocks_for(num_tokens) - len(sequence.blocks) <= self.num_free

    def grow(self, sequence: Sequence, num_tokens: int) -> None:
        """Allocate blocks until `sequence` has room for `num_tokens` in all."""
        while len(sequence.blocks) < self.blocks_for(num_tokens):
            block = self._take()
            self._ref_counts[block] = 1
            sequence.blocks.append(block)

    def can_admit(self, sequence: Sequence, *, without: Iterable[Sequence] = ()) -> bool:
        """Return whether there are blocks for its tokens and the next one, so that it is not preempted at once.

        `without`: sequences that would be released for it.
        """
        released = Counter(block for other in without for block in other.blocks)
        num_free = self.num_free + sum(self._ref_counts[block] == count for block, count in released.items())
        prefix = self._prefix(sequence)
        taken = sum(self._ref_counts[block] == released[block] for block in prefix)
        return self.blocks_for(len(sequence.tokens) + 1) - len(prefix) <= num_free - taken

    def admit(self, sequence: Sequence) -> None:
        """Give it the blocks of its longest cached prefix, and empty ones for the rest."""
        for block in self._prefix(sequence):
            self._ref_counts[block] += 1
            self._idle.pop(block, None)
            sequence.blocks.append(block)
        sequence.num_computed = len(sequence.blocks) * self.block_size
        sequence.num_published = len(sequence.blocks)
        self.grow(sequence, len(sequence.tokens) + 1)

    def cache_full_blocks(self, sequence: Sequence) -> None:
        """Publish full blocks to the prefix cache."""
        if not self._caches_prefixes:
            return
        while sequence.num_published < sequence.num_computed // self.block_size:
            block, key = sequence.blocks[sequence.num_published], sequence.key(sequence.num_published, self.block_size)
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key
            sequence.num_published += 1

    def release(self, sequence: Sequence) -> None:
        """Drop its references; a block that has no other is free."""
        for block in reversed(sequence.blocks):  # so that the end of a prefix is reused before its beginning
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0 and block in self._key_of:
                self._idle[block] = None
            elif self._ref_counts[block] == 0:
                self._empty.append(block)
        sequence.blocks.clear()
        sequence.num_computed = sequence.num_published = 0

    def check(self, sequences: list[Sequence]) -> None:
        """Check that every block is empty, idle, or referenced by exactly as many sequences as are counted."""
        counted = [0] * self.num_blocks
        for sequence in sequences:
            for block in sequence.blocks:
                counted[block] += 1
        assert counted == self._ref_counts, "a KV block is lost, or referenced by an unknown sequence"
        free = [*self._empty, *self._idle]
        assert len(free) == len(set(free)), "a KV block is free twice"
        assert sorted(free) == [block for block, count in enumerate(counted) if not count], "a KV block is lost"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "the prefix cache is inconsistent"

    def _take(self) -> int:
        if self._empty:
            return self._empty.pop()
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block

    def _prefix(self, sequence: Sequence) -> list[int]:
        """Return the cached blocks of its first tokens; never of all, for the last one's logits must be computed."""
        found = []
        for number in range((len(sequence.tokens) - 1) // self.block_size):
            block = self._block_of.get(sequence.key(number, self.block_size))
            if block is None:
                break
            found.append(block)
        return found
