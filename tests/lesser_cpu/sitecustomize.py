"""Every Python that scripts/as_cpu.sh starts: bitsandbytes finds no AVX512-BF16, whatever the processor has."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

_ASKED = "bitsandbytes.functional"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds that one module as everybody does, and changes one function of it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != _ASKED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            module.has_avx512bf16 = lambda: False  # type: ignore[attr-defined]

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())
