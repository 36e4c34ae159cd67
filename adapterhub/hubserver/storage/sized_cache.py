"""A cache that is bounded by bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class SizedCache(Generic[Value]):
    """The most recently used values of at most `max_bytes` together; several threads can use it."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.size_bytes = 0

    def get(self, key: Hashable, make: Callable[[], tuple[Value, int]]) -> Value:
        """Return the value of `key`. If it is not here, `make` returns it, with its size in bytes."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        # Without the lock: two threads may make the same value, but none waits for another's file.
        value, size = make()
        with self._lock:
            self.size_bytes += size - self._values.pop(key, (None, 0))[1]
            self._values[key] = value, size
            while self.size_bytes > self._max_bytes:
                self.size_bytes -= self._values.popitem(last=False)[1][1]
        return value
