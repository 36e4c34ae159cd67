"""Everything a training run depends on, as one frozen value read from TOML. Reads no data and loads no model."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from adapterhub.adapter import AdapterRef, BaseName
from adapterhub.errors import InvalidRef, RecipeError
from adapterhub.probe import PROMPTS
from train.data.formats import FormatName, OnFault

LossOn = Literal["assistant", "last", "all"]
Schedule = Literal["constant", "cosine", "linear"]
PreferenceMethod = Literal["dpo", "kto", "orpo"]
Method = Literal["lora", "prompt", "prefix", "head", "full"]
Targets = Literal["all-linear", "attention", "mlp"]
SHIPPED_TEMPLATES = ("guanaco", "alpaca")


class _Section(BaseModel):
    # Strict: a recipe that says "16" or true where a number belongs is a recipe with a fault.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Data(_Section):
    held_out: float = Field(default=0.1, ge=0)
    """below 1: the fraction of questions kept from training and measured; else their number; 0: none"""
    max_length: int = Field(default=512, ge=8)
    """tokens; longer samples are cut, and counted"""
    template: str | None = None
    """one of SHIPPED_TEMPLATES or a .jinja file, relative to the recipe; None: the base's chat template"""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] | None = None
    """strings that end an answer beside the end of text; None: those of the template"""

    @field_validator("template")
    @classmethod
    def _shipped_or_a_file(cls, name: str | None) -> str | None:
        if name is not None and name not in SHIPPED_TEMPLATES and not name.endswith(".jinja"):
            near = difflib.get_close_matches(name, SHIPPED_TEMPLATES, n=1)
            asked = f" (nearest: {near[0]})" if near else ""
            raise ValueError(f"expected {', '.join(SHIPPED_TEMPLATES)} or a .jinja file{asked}")
        return name

    @field_validator("held_out")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a fraction below 1, or a whole number of questions")
        return value


class ChatterbotData(_Data):
    source: Literal["chatterbot"]
    topic: str = Field(min_length=1)


class RowData(_Data):
    """Data whose rows may be in any of the formats of train/data/formats.py."""

    path: str = Field(min_length=1)
    format: Literal["auto"] | FormatName = "auto"
    """auto: as the first row shows"""
    on_fault: OnFault = "stop"
    """what is done about rows that are not as the format wants them: told and refused, or left out and counted"""


class FileData(RowData):
    """`path`: JSONL, JSON, CSV, TSV or text, relative to the recipe's folder."""

    source: Literal["file"]


class DatasetsData(RowData):
    """`path`: a set as its Hub names it, one of the paper's by its short name, or a folder (`./name`)."""

    source: Literal["datasets"]
    subset: str | None = None
    split: str = Field(default="train", min_length=1)
    revision: str | None = None
    """branch, tag or commit of the Hub's repository"""

    @model_validator(mode="after")
    def _folders_have_no_revision(self) -> DatasetsData:
        if self.revision and self.path.startswith((".", "/", "~")):
            raise ValueError(f"path = {self.path!r} is a folder, which has no revision: leave revision out")
        return self


class FeedbackData(_Data):
    """What people said of a server's answers; `path` is its store, by default this machine's."""

    source: Literal["feedback"]
    path: str | None = Field(default=None, min_length=1)


class ShippedData(_Data):
    source: Literal["shipped"]
    name: str = Field(min_length=1)


class LoraSection(_Section):
    """LoRA (arXiv 2106.09685); rsLoRA scales by alpha / sqrt(rank) (2312.03732); DoRA adds magnitudes (2402.09353)."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    init: Literal["default", "pissa", "loftq", "eva"] = "default"
    """what A and B begin as (train/loop/lora_init.py); the base is never changed"""
    rank: int = Field(default=16, ge=1, le=4096)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Targets | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """all linear layers but the output head, those of attention or of the MLPs; or a list of such words, `embeddings`,
    `head` and names of linear layers (`q_proj`)"""

    @model_validator(mode="after")
    def _starts_on_linear_layers(self) -> LoraSection:
        if self.init != "default" and {"embeddings", "head"} & set(self.targets):
            raise ValueError(f"init = {self.init} is for the layers between embeddings and head: leave these out")
        return self


def adapter_size(lora: LoraSection) -> tuple[int, float]:
    """(rank, alpha) of the adapter a recipe makes. PiSSA keeps what A and B began with beside them, at their scale."""
    if lora.init != "pissa":
        return lora.rank, lora.alpha
    return 2 * lora.rank, lora.alpha * (math.sqrt(2) if lora.method == "rslora" else 2)


class TrainSection(_Section):
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """samples in one forward pass"""
    gradient_accumulation: int = Field(default=1, ge=1)
    """forward passes in one step; the loss is the mean over all their trained tokens"""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=5, ge=0)
    max_grad_norm: float = Field(default=0.3, gt=0)
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """learning rate of B over that of A (LoRA+, arXiv 2402.12354)"""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """noise on embedded tokens (NEFTune, arXiv 2310.05914); 0: none"""
    activation_checkpointing: bool = False
    """compute activations again in the backward pass: the same result from less memory, a third slower"""
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    loss_on: LossOn = "assistant"
    """every answer, the last answer of each conversation, or every token"""
    evaluate_every: int = Field(default=0, ge=0)
    """steps between held-out losses during the run; 0: only before and after"""
    keep: Literal["last", "best"] = "last"
    """the weights after the last step, or those with the lowest held-out loss"""
    patience: int = Field(default=0, ge=0)
    """held-out losses in a row without a new lowest one that end the run; 0: never"""
    group_by_length: bool = False
    """samples of similar length share a step"""
    checkpoint_every: int = Field(default=50, ge=0)
    """steps between checkpoints; 0: only when the run is stopped"""
    sample_every: int = Field(default=0, ge=0)
    """steps between answers to `prompts`, which the bare base and the result answer too; 0: nobody answers"""
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=16)] = PROMPTS

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("expected either epochs or steps")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts held-out losses: set evaluate_every too")
        if self.keep == "best" and not self.evaluate_every:
            raise ValueError("keep = best compares held-out losses: set evaluate_every too")
        return self

    @property
    def moment_bytes(self) -> int:
        """Of the optimizer, both moments of one parameter."""
        return 2 if self.optimizer.endswith("8bit") else 8

    def num_steps(self, num_samples: int) -> int:
        if self.steps is not None:
            return self.steps
        return (self.epochs or 1) * math.ceil(num_samples / (self.batch_size * self.gradient_accumulation))


class PreferenceSection(_Section):
    """Learning from compared replies: DPO (arXiv 2305.18290), KTO (2402.01306) or ORPO (2403.07691)."""

    method: PreferenceMethod
    beta: float = Field(default=0.1, gt=0)
    """DPO, KTO: how closely the reference is held to; ORPO: the weight of its odds ratio (the paper's lambda)"""
    desirable_weight: float = Field(default=1.0, gt=0)
    undesirable_weight: float = Field(default=1.0, gt=0)
    """KTO's lambda_D and lambda_U, against sides of unequal size"""

    @model_validator(mode="after")
    def _weights_are_ktos(self) -> PreferenceSection:
        if self.method != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(f"desirable_weight and undesirable_weight are KTO's, the method is {self.method}")
        return self


class QuantizationSection(_Section):
    """How the base is held; every option reaches bitsandbytes by name (adapterhub/bases/quantization.py)."""

    kind: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quant: bool = True
    """quantization constants in 8 bit too; of nf4 and fp4"""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """weights per constant; of nf4 and fp4"""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    @model_validator(mode="after")
    def _blocks_are_of_4_bit(self) -> QuantizationSection:
        if self.kind in ("int8", "none") and (self.block_size, self.double_quant) != (64, True):
            raise ValueError(f"block_size and double_quant belong to nf4 and fp4, the kind is {self.kind}")
        return self


class Recipe(_Section):
    """A training run as its author wrote it. `folder` is where the recipe's relative paths start."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    base: str
    start: str | None = None
    """the adapter to go on from: `owner/name`, `name@alias`, a folder, `sha256:...`; None: a new one"""
    seed: int = Field(default=0, ge=0, lt=2**32)
    method: Method = "lora"
    """what is trained: LoRA; a soft prompt (arXiv 2104.08691) or prefix (2101.00190); the output head; every weight"""
    virtual_tokens: int = Field(default=16, ge=1)
    """of a soft prompt or prefix"""
    data: Annotated[
        ChatterbotData | FileData | DatasetsData | FeedbackData | ShippedData, Field(discriminator="source")
    ]
    lora: LoraSection = LoraSection()
    train: TrainSection
    preference: PreferenceSection | None = None
    """None: learn to write the answers of the data; else: to prefer some over others"""
    quantization: QuantizationSection = QuantizationSection()

    _folder: Path = PrivateAttr(default=Path())

    SECTIONS: ClassVar[dict[str, tuple[type[_Section], ...]]] = {
        "data": (ChatterbotData, FileData, DatasetsData, FeedbackData, ShippedData),
        "lora": (LoraSection,),
        "train": (TrainSection,),
        "preference": (PreferenceSection,),
        "quantization": (QuantizationSection,),
    }

    @field_validator("base")
    @classmethod
    def _names_a_base(cls, text: str) -> str:
        try:
            BaseName.parse(text)
        except InvalidRef as error:
            raise ValueError(str(error)) from error
        return text

    @field_validator("start")
    @classmethod
    def _names_an_adapter(cls, text: str | None) -> str | None:
        try:
            return text if text is None else str(AdapterRef.parse(text))
        except InvalidRef as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if faults := [*self._data_clashes(), *self._method_clashes()]:
            raise ValueError("; ".join(faults))
        return self

    def _data_clashes(self) -> Iterator[str]:
        """What [data] rules out elsewhere."""
        data, train = self.data, self.train
        format = data.format if isinstance(data, RowData) else "auto"
        if format == "text" and train.loss_on != "all":
            yield 'format = "text" has no answers: set loss_on = "all" in [train]'
        if self.preference:
            if not isinstance(data, RowData | FeedbackData):
                yield "[preference] learns from compared replies: set source to file, datasets or feedback in [data]"
            if format not in ("auto", "hh-rlhf"):
                yield f"[preference] reads compared replies, not {format}: leave format out"
            if train.loss_on == "all":
                yield "[preference] trains the compared replies alone: leave loss_on out"
        if not data.held_out and (train.keep == "best" or train.patience):
            yield "keep = best and patience need questions held out: set held_out above 0 in [data]"
        elif not data.held_out and train.evaluate_every:
            yield "evaluate_every measures on questions held out: set held_out above 0 in [data]"

    def _method_clashes(self) -> Iterator[str]:
        """What [lora] and the method rule out elsewhere."""
        is_lora = self.method == "lora"
        if not is_lora and "lora" in self.model_fields_set:
            yield f"[lora] belongs to method = lora, the method is {self.method}"
        if not is_lora and self.start:
            yield f"start goes on from a LoRA adapter, the method is {self.method}"
        if not is_lora and self.train.lora_plus_ratio != 1:
            yield f"lora_plus_ratio is about A and B of LoRA, the method is {self.method}"
        if self.method == "full" and self.quantization.kind != "none":
            yield 'method = full changes every weight, which few bits cannot hold: set kind = "none" in [quantization]'
        if self.method == "prefix" and self.train.activation_checkpointing:
            yield "activation_checkpointing loses the keys and values of a prefix: leave it out, or use method = prompt"
        if self.lora.init == "pissa" and self.train.weight_decay:
            yield "init = pissa keeps what it began with beside A and B, which weight_decay would shrink: set it to 0"
        if self.lora.init == "loftq" and self.quantization.kind not in ("nf4", "fp4"):
            yield f"init = loftq makes up for 4-bit rounding, the kind is {self.quantization.kind}"

    def base_arguments(self) -> dict[str, Any]:
        """For `load_base`, which chooses a dtype when it is given none."""
        held = self.quantization.model_dump()
        wanted = held.pop("compute_dtype")
        if wanted == "auto":
            # A weight of bf16 would lose most updates: they are smaller than half its last digit.
            wanted = "float32" if self.method == "full" else None
        return {"dtype": wanted, **held}

    @property
    def base_name(self) -> BaseName:
        return BaseName.parse(self.base)

    @property
    def folder(self) -> Path:
        return self._folder

    def to_toml(self) -> str:
        """The recipe with every default written out; `read_recipe` reads it back to an equal recipe."""
        raw = self.model_dump(mode="json", exclude_none=True, exclude=set() if self.method == "lora" else {"lora"})
        lines = [f"{key} = {_toml(value)}" for key, value in raw.items() if not isinstance(value, dict)]
        for section, content in raw.items():
            if isinstance(content, dict):
                lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in content.items())]
        return "\n".join(lines) + "\n"


def read_recipe(path: Path, *, folder: Path | None = None) -> Recipe:
    """Parse a TOML recipe, whose relative paths start at `folder` (the recipe's own when not given).

    Raises RecipeError listing every fault: section, key, and the nearest known key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(shipped_recipes()))
        raise RecipeError(
            f"{path} cannot be read ({error.strerror}): expected a recipe file; shipped: {names}."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error}): a recipe is a TOML file.") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise RecipeError(f"{path} is not TOML: {error}.") from error
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [_fault(entry["type"], entry["loc"], entry["msg"], entry.get("input")) for entry in error.errors()]
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{path} has {count}: {'; '.join(dict.fromkeys(faults))}.") from error
    recipe._folder = path.parent if folder is None else folder
    return recipe


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with adapterhub."""
    folder = Path(str(package_files("train"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _fault(kind: str, loc: tuple[int | str, ...], message: str, found: Any) -> str:
    """One fault in words. Drops the names pydantic puts into `loc` for the alternative it was trying."""
    section = str(loc[0]) if loc and loc[0] in Recipe.SECTIONS else None
    keys = [part for part in loc if isinstance(part, str) and part in _keys_of(section)]
    where = f"[{section}]" if section else "top level"
    if kind == "extra_forbidden":
        return f"{where}: unknown key {loc[-1]!r}{_nearest_key(str(loc[-1]), section)}"
    if kind == "missing":
        return f"{where}: {loc[-1]} is missing"
    if kind.startswith("union_tag"):
        return f"{where}: source is one of chatterbot, datasets, feedback, file, shipped"
    shown = f" = {found!r}" if keys and isinstance(found, str | int | float | bool) else ""
    name = f" {keys[-1]}{shown}:" if keys else ""
    return f"{where}:{name} {message.removeprefix('Value error, ')}"


def _keys_of(section: str | None) -> set[str]:
    if section is None:
        return set(Recipe.model_fields)
    return {key for model in Recipe.SECTIONS[section] for key in model.model_fields}


def _nearest_key(key: str, section: str | None) -> str:
    """The nearest known key, looked for in the same section first."""
    for place in (section, None, *Recipe.SECTIONS):
        if near := difflib.get_close_matches(key, _keys_of(place), n=1, cutoff=0.6):
            return f" (nearest: {near[0]} in {f'[{place}]' if place else 'the top level'})"
    return f" (known here: {', '.join(sorted(_keys_of(section)))})"


def _toml(value: str | int | float | bool | list[str]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's; TOML wants one control character more escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
