"""PEFT's adapter_config.json and tensor names, read without PEFT: what is adapted, at which rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from adapterhub.errors import AdapterUnsupported, InvalidTensors, MissingFile
from adapterhub.package.manifest import Lora
from adapterhub.package.module_patterns import MAX_PATTERNS, check_ending, check_pattern, ends_with, matches
from adapterhub.package.safetensors_header import TensorInfo
from adapterhub.strict import parse_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
NO_LAYERS = "dummy-target-modules"
"""PEFT's target of a LoRA on no layer, which has full weights of modules only."""

_MAX_CONFIG_BYTES = 10_000_000
_MAX_RANK = 1 << 31
_MAX_MATCHES = 8_000_000
"""Maximum number of pairs of a pattern and a module: half a minute."""
_MAX_MODULE = 200
"""Maximum length of a module's dotted name, in characters."""
_ALL_LINEAR = "all-linear"
"""PEFT's target of every linear layer but the output head."""
_DTYPES = ("F16", "BF16", "F32", "F64")

_T = TypeVar("_T")
TensorKind = Literal["lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "weight"]
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<kind>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?:\.weight)?"
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_WHOLE_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<kind>weight)")

# Fields that change what the adapter computes. Anything but these values is not plain LoRA; a field we have
# never heard of is ignored, because every PEFT release adds some and writes them with an inert default.
_INERT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "ensure_weight_tying": (False, None),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
    "arrow_config": (None,),
    # Starts of training. Those that are not here change the base's weights, which a package does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
}
_CHANGED_BASES = (
    " (training began with changed weights of the base: convert the adapter to plain LoRA, with "
    "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...))"
)


_SOFT_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING")
_SOFT_PROMPT = " (a soft prompt stands before every text and changes no layer: no package holds one; PEFT loads it)"


@dataclass(frozen=True)
class LoraTensor:
    """One tensor of an adapter file: which module of the base it belongs to, and its part."""

    key: str
    module: str
    kind: TensorKind
    info: TensorInfo


@dataclass(frozen=True)
class LoraConfig:
    """The part of adapter_config.json that decides what base + adapter computes."""

    rank: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    targets: tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    saved_modules: tuple[str, ...] = ()
    """Names of modules whose full weights the adapter has (PEFT's modules_to_save)."""
    is_pattern: bool = False
    """Whether the one target is a regular expression."""
    excluded: tuple[str, ...] = ()
    """Modules that are not adapted (exclude_modules)."""
    is_excluded_by_pattern: bool = False
    """Whether the one entry of `excluded` is a regular expression."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that are adapted (layers_to_transform); empty: all."""
    layer_lists: tuple[str, ...] = ()
    """Names of the lists that the numbers count in (layers_pattern); empty: any."""

    @property
    def is_everywhere(self) -> bool:
        """Whether targets are adapted in every layer."""
        return not self.excluded and not self.layers

    @property
    def is_all_linear(self) -> bool:
        """Whether the target is PEFT's word for all linear layers but the output head."""
        return self.targets == (_ALL_LINEAR,)

    def aims_at(self, module: str) -> bool:
        """Apply PEFT's rule: a list has ends of module names, a string is a regular expression for the whole name."""
        if self.excluded and _is_named(module, self.excluded, is_pattern=self.is_excluded_by_pattern):
            return False
        if any(f".{name}." in f".{module}." for name in self.saved_modules):
            return False
        if not self.is_all_linear and not _is_named(module, self.targets, is_pattern=self.is_pattern):
            return False
        return not self.layers or _layer_number(module, self.layer_lists) in self.layers

    def rank_of(self, module: str) -> int:
        return _matched(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return _matched(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """Return alpha / r (arXiv 2106.09685, 4.1), or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        rank = self.rank_of(module)
        alpha = self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def described(self) -> Lora:
        """Return the manifest's entry for it."""
        method: Literal["lora", "rslora", "dora", "head"] = "lora"
        if self.targets == (NO_LAYERS,):
            method = "head"
        elif self.use_dora:
            method = "dora"
        elif self.use_rslora:
            method = "rslora"
        return Lora(
            method=method,
            rank=self.rank,
            alpha=self.alpha,
            scaling=self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank),
            targets=list(self.saved_modules if method == "head" else self.targets),
            rank_pattern=self.rank_pattern,
            alpha_pattern=self.alpha_pattern,
        )


def _matched(pattern: dict[str, _T], module: str, default: _T) -> _T:
    """Apply PEFT's rule: a key is a regular expression for the end of the module's dotted name."""
    for key, value in pattern.items():
        if ends_with(key, module):
            return value
    return default


def _is_named(module: str, names: tuple[str, ...], *, is_pattern: bool) -> bool:
    if is_pattern:
        return matches(names[0], module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer_number(module: str, lists: tuple[str, ...]) -> int | None:
    """Return the first number in the module's name that follows the first of `lists` there is, or any name.

    PEFT's rule: in `layers.1.experts.0.up_proj` it is 1.
    """
    parts = module.split(".")
    places = [place for place in range(1, len(parts) - 1) if parts[place].isdecimal()]
    if not lists:
        return next((int(parts[place]) for place in places if place > 1), None)
    return next((int(parts[place]) for name in lists for place in places if parts[place - 1] == name), None)


def read_lora_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json. Raises MissingFile, AdapterUnsupported naming each field that is not LoRA's."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise MissingFile(f"{folder} has no {CONFIG_NAME}: point to the folder PEFT's save_pretrained wrote.")
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        raw = parse_json(path.read_bytes())
        faults = [f"{key}={raw[key]!r}" for key, inert in _INERT.items() if key in raw and raw[key] not in inert]
        if faults:
            raise AdapterUnsupported(
                f"{path} asks for {', '.join(faults)}, which is not supported: train with plain LoRA, rsLoRA or DoRA"
                f"{_SOFT_PROMPT if raw.get('peft_type') in _SOFT_PROMPTS else ''}"
                f"{_CHANGED_BASES if any(fault.startswith('init_lora_weights') for fault in faults) else ''}."
            )
        targets, excluded = raw["target_modules"], raw.get("exclude_modules") or ()
        layers, lists = raw.get("layers_to_transform"), raw.get("layers_pattern") or ()
        is_pattern = isinstance(targets, str) and targets != _ALL_LINEAR
        return LoraConfig(
            rank=_positive(raw["r"]),
            alpha=_number(raw["lora_alpha"]),
            use_rslora=bool(raw.get("use_rslora")),
            use_dora=bool(raw.get("use_dora")),
            targets=_names(targets),
            rank_pattern=_by_ending(raw.get("rank_pattern"), _positive),
            alpha_pattern=_by_ending(raw.get("alpha_pattern"), _number),
            saved_modules=_literal(_names(list(raw.get("modules_to_save") or ()))),
            is_pattern=is_pattern,
            excluded=_names(excluded),
            is_excluded_by_pattern=isinstance(excluded, str),
            layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
            layer_lists=_literal((lists,) if isinstance(lists, str) else tuple(lists)),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise AdapterUnsupported(
            f"{path} cannot be read as a LoRA config ({error!r}): expected peft_type, r, lora_alpha and "
            "target_modules as PEFT writes them. Save the adapter with a current PEFT."
        ) from error


def _positive(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise ValueError(f"rank {value!r} is not a whole number from 1 to {_MAX_RANK}")
    return value


def _names(given: Any) -> tuple[str, ...]:
    """Return names of modules: a list, a regular expression, or PEFT's word for all linear layers."""
    if isinstance(given, str):
        return (given if given == _ALL_LINEAR else check_pattern(given),)
    if not all(isinstance(name, str) for name in given):
        raise ValueError(f"the modules {list(given)!r} are not names")
    return tuple(sorted(given))


def _literal(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return names that PEFT takes for regular expressions, and that match themselves."""
    for name in names:
        if _PLAIN_NAME.fullmatch(name) is None:
            raise ValueError(f"{name[:60]!r} is a pattern: expected the name of a module")
    return names


def _by_ending(patterns: Any, value_of: Callable[[Any], _T]) -> dict[str, _T]:
    if len(patterns or {}) > MAX_PATTERNS:
        raise ValueError(f"{len(patterns):,} patterns of ranks or alphas: expected at most {MAX_PATTERNS:,}")
    return {check_ending(key): value_of(value) for key, value in (patterns or {}).items()}


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"alpha {value!r} is not a number")
    return float(value)


def lora_tensors(header: dict[str, TensorInfo], config: LoraConfig) -> list[LoraTensor]:
    """Return the header's tensors, each with its module, checked against the config's rank.

    A is [r, in], B is [out, r], DoRA's magnitude is [out]; of an embedding A is [r, vocabulary], B [width, r]; a
    module of modules_to_save has its whole weight. Raises AdapterUnsupported for tensors that are neither,
    InvalidTensors for missing halves, wrong ranks and magnitudes of another size.
    """
    tensors = []
    parts: dict[str, dict[TensorKind, TensorInfo]] = {}
    for key, info in header.items():
        match = (_KEY.fullmatch(key) or _WHOLE_KEY.fullmatch(key)) if len(key) <= _MAX_MODULE else None
        if match is None or _wrapper_of(key) or (match["kind"] == "weight" and not _is_saved(match["module"], config)):
            raise AdapterUnsupported(_foreign(key))
        kind: TensorKind = match["kind"]  # type: ignore[assignment]
        if kind != "weight" and not config.aims_at(match["module"]):
            raise AdapterUnsupported(
                f"the file has {kind} of {match['module']}, which {CONFIG_NAME} does not target: expected "
                "tensors of its target_modules alone, since PEFT would leave this one out. Save the adapter again."
            )
        if info.dtype not in _DTYPES:
            raise InvalidTensors(
                f"{key} has dtype {info.dtype}: expected one of {', '.join(_DTYPES)}. Convert it and save it again."
            )
        tensors.append(LoraTensor(key, match["module"], kind, info))
        parts.setdefault(match["module"], {})[kind] = info
    if not tensors:
        raise InvalidTensors("the adapter file contains no tensors. Train or save the adapter again.")
    num_patterns = len(config.rank_pattern) + len(config.alpha_pattern)
    if num_patterns * len(parts) > _MAX_MATCHES:
        raise AdapterUnsupported(
            f"{num_patterns:,} patterns of ranks and alphas for {len(parts):,} modules: expected at most "
            f"{_MAX_MATCHES:,} pairs. Give several modules one pattern."
        )
    for module, found in parts.items():
        _check_module(module, found, config)
    return tensors


_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def _wrapper_of(key: str) -> str | None:
    """Return what put its own name into the name of a tensor."""
    if key.startswith("module."):
        return "DataParallel"
    return next((name for part, name in _WRAPPERS.items() if part in key.split(".")), None)


def _foreign(key: str) -> str:
    """Return why a tensor of this name does not belong in an adapter file, and what to do."""
    told = f"tensor {key[:_MAX_MODULE]!r} is not one of LoRA"
    advice = "save the adapter again with PEFT's save_pretrained"
    wrapper = _wrapper_of(key)
    if wrapper is not None:
        return f"{told}: its name comes from {wrapper}. Unwrap the model, and {advice}."
    if not key.startswith("base_model.model."):
        return f"{told}: expected base_model.model.MODULE.lora_A.weight and the like. PEFT would ignore it: {advice}."
    if ".default." in key:
        return f"{told}: it has the adapter's name (`default`) in it, as a plain state_dict has. Instead, {advice}."
    if re.search(r"norm", key.rpartition(".weight")[0].rpartition(".")[2]):
        return f"{told}: it is the weight of a norm. Only the embedding's and the head's whole weights are supported."
    return (
        f"{told} (base_model.model.MODULE.lora_A or lora_B), and modules_to_save does not name it: whole weights and "
        "optimizer states do not belong in an adapter. Save it with save_embedding_layers=False."
    )


def _is_saved(module: str, config: LoraConfig) -> bool:
    """Apply PEFT's rule: a name of modules_to_save is the end of the module's dotted name."""
    return any(module == name or module.endswith(f".{name}") for name in config.saved_modules)


def _check_module(module: str, found: dict[TensorKind, TensorInfo], config: LoraConfig) -> None:
    if set(found) == {"weight"}:
        return
    is_embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    first, second = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
    wanted = {first, second, "lora_magnitude_vector"} if config.use_dora else {first, second}
    if set(found) != wanted:
        raise InvalidTensors(f"{module} has {', '.join(sorted(found))}, expected {', '.join(sorted(wanted))}.")
    rank = config.rank_of(module)
    a, b = found[first].shape, found[second].shape  # type: ignore[index]
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise InvalidTensors(
            f"{module}: {first} {list(a)} and {second} {list(b)} do not match rank {rank} of {CONFIG_NAME}: "
            "expected [r, in] and [out, r]."
        )
    magnitude = found.get("lora_magnitude_vector")
    if magnitude is not None and math.prod(magnitude.shape) != b[0]:
        raise InvalidTensors(
            f"{module}: lora_magnitude_vector {list(magnitude.shape)} does not match the {b[0]} outputs of {second}: "
            "expected [out]."
        )
