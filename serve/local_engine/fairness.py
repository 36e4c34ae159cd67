"""Who is served next: virtual token counters per group of requests. No tensors.

VTC, algorithm 2 of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588), with
weights.
"""

from __future__ import annotations

from collections.abc import Collection

from serve.engine import GenerationRequest

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
"""Price of a token, the paper's section 5."""

Group = str
"""Digest of the adapter that requests are charged to, or BASE."""

BASE: Group = ""

_LARGE = 2.0**40
"""Counters are moved down beyond this, and no charge is larger: differences of one token stay exact in a double."""


def group_of(request: GenerationRequest) -> Group:
    """Return the adapter a request is charged to: the one with the largest scale of its mix, BASE where all are 0.

    A mix is no group of its own: n adapters have 2^n - 1 of them, each of which would be another share for the same
    client. Nor is it charged to each of its adapters. Ordered by the most served one, it would be overtaken for ever by
    requests for either alone; ordered by the least served one, it would use up the other's share. So there are as many
    shares as adapters, whatever is asked for, and the paper's bounds hold as they are. The order of the entries, those
    of scale 0, and one adapter split over several entries change nothing.
    """
    scales: dict[str, float] = {}
    for adapter in request.adapters:
        scales[adapter.digest] = scales.get(adapter.digest, 0.0) + adapter.scale
    return max(((abs(scale), digest) for digest, scale in scales.items() if scale), default=(0.0, BASE))[1]


class FairShare:
    """How much each group has been served, in prices of tokens over its weight; the least served comes first."""

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}
        self._last_left = BASE

    def __len__(self) -> int:
        """Number of groups remembered."""
        return len(self._served)

    def served(self, group: Group) -> float:
        return self._served.get(group, 0.0)

    def arrive(self, group: Group, *, waiting: Collection[Group], running: Collection[Group]) -> None:
        """Lift a group of which nothing waits, as its next request comes: it has no credit for the time it was away.

        The level is the least served waiting group's counter, or that of the group that waited last (lines 7 to 13).
        Idle groups that would be lifted to the same level are forgotten.
        """
        level = min((self.served(other) for other in waiting), default=self.served(self._last_left))
        kept = {*waiting, *running, self._last_left}
        self._served = {other: count for other, count in self._served.items() if count > level or other in kept}
        self._served[group] = max(self._served.get(group, level), level)
        if level > _LARGE:
            self._served = {other: count - level for other, count in self._served.items()}

    def leave(self, group: Group) -> None:
        """Note that the last waiting request of a group was admitted or aborted."""
        self._last_left = group

    def charge(self, request: GenerationRequest, *, num_input: int, num_output: int) -> None:
        group = group_of(request)
        price = num_input * INPUT_PRICE + num_output * OUTPUT_PRICE
        self._served[group] = self.served(group) + min(price / request.weight, _LARGE)
