"""Who is served next: virtual token counters (VTC, arXiv 2401.00588, algorithm 2) per group of requests. No tensors."""

from __future__ import annotations

from collections.abc import Iterable

from serve.engine import GenerationRequest

INPUT_PRICE, OUTPUT_PRICE = 1.0, 2.0
"""of a token, the paper's section 5"""

Group = tuple[str, ...]
"""the digests of a request's adapters; () is the bare base"""


def group_of(request: GenerationRequest) -> Group:
    return tuple(adapter.digest for adapter in request.adapters)


class FairShare:
    """How much each group has been served, in prices of tokens over its weight; the least served comes first."""

    def __init__(self) -> None:
        self._served: dict[Group, float] = {}

    def served(self, group: Group) -> float:
        return self._served.get(group, 0.0)

    def join(self, group: Group, active: Iterable[Group]) -> None:
        """A group comes back from idleness: it gets no credit for the time it asked for nothing."""
        floor = min((self.served(other) for other in active), default=0.0)
        self._served[group] = max(self.served(group), floor)

    def charge(self, request: GenerationRequest, *, num_input: int, num_output: int) -> None:
        group = group_of(request)
        price = num_input * INPUT_PRICE + num_output * OUTPUT_PRICE
        self._served[group] = self.served(group) + price / request.weight
