"""Choose the group that is served next, by virtual token counters (VTC). No tensors.

VTC, algorithm 2 of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024, arXiv 2401.00588), with
weights.
"""

from __future__ import annotations

from collections.abc import Collection

from serve.engine import GenerationRequest

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
"""Prices of a prompt token and of an answer token (section 5 of the paper)."""

Group = str
"""Digest of the adapter that requests are charged to, or BASE."""

BASE: Group = ""

_LARGE = 2.0**40
"""Counters above this are lowered together, and no charge is larger: one token still counts in a double."""


def group_of(request: GenerationRequest) -> Group:
    """Return the adapter a request is charged to: the one with the largest scale of its mix, BASE where all are 0.

    A mix is not a group: n adapters have 2^n - 1 mixes, each of which would be another share for the same
    client. Nor is it charged to each of its adapters. Ordered by the most served one, it would be overtaken forever by
    requests for either alone; ordered by the least served one, it would use up the other's share. So there are as many
    shares as adapters, whatever requests name, and the paper's bounds hold as they are. The order of the entries, those
    of scale 0, and one adapter split over several entries change nothing.
    """
    scales: dict[str, float] = {}
    for adapter in request.adapters:
        scales[adapter.digest] = scales.get(adapter.digest, 0.0) + adapter.scale
    return max(((abs(scale), digest) for digest, scale in scales.items() if scale), default=(0.0, BASE))[1]


class FairShare:
    """Service of each group: prices of its tokens divided by its weight. The least served group comes first."""

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}
        self._last_left = BASE

    def __len__(self) -> int:
        """Return the number of groups with a counter."""
        return len(self._served)

    def served(self, group: Group) -> float:
        return self._served.get(group, 0.0)

    def arrive(self, group: Group, *, waiting: Collection[Group], running: Collection[Group]) -> None:
        """Lift the counter of a group without waiting requests when its next one comes: idle time earns no credit.

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
        """Add computed tokens to the counter of the request's group."""
        group = group_of(request)
        price = num_input * INPUT_PRICE + num_output * OUTPUT_PRICE
        self._served[group] = self.served(group) + min(price / request.weight, _LARGE)
