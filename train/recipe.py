"""The recipe of a training run: schema, checks, and TOML."""

from __future__ import annotations

import datetime
import difflib
import math
import tomllib
from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomlkit
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
    # Strict: "16" or true in place of a number is a fault.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Source(_Section):
    weight: float = Field(default=1.0, gt=0)
    """Passes over the source in an epoch, in a mix: 2 trains every sample twice, 0.5 a half of them once."""


class _Data(_Section):
    held_out: float = Field(default=0.1, ge=0)
    """Held-out questions: a fraction when below 1, else their number; 0: none."""
    max_length: int = Field(default=512, ge=8)
    """Maximum length of a sample, in tokens; longer samples are cut, and counted."""
    template: str | None = None
    """Chat template: one of SHIPPED_TEMPLATES, or a .jinja file relative to the recipe; None: the base's."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] | None = None
    """Strings that end an answer, besides EOS; None: those of the template."""
    date: Annotated[datetime.date, Field(strict=False)] | None = None
    """Date that templates render which read the clock; None: the day on which the run starts."""
    duplicates: Literal["remove", "keep"] = "remove"
    """What to do about conversations that equal an earlier one: leave them out and report them, or train them."""

    @field_validator("template")
    @classmethod
    def _shipped_or_a_file(cls, name: str | None) -> str | None:
        if name is not None and name not in SHIPPED_TEMPLATES and not name.endswith(".jinja"):
            near = difflib.get_close_matches(name, SHIPPED_TEMPLATES, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(f"expected {', '.join(SHIPPED_TEMPLATES)} or a .jinja file{hint}")
        return name

    @field_validator("held_out")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError("expected a fraction below 1, or a whole number of questions")
        return value


class ChatterbotSource(_Source):
    """A topic of the English chatterbot corpus."""

    source: Literal["chatterbot"]
    topic: str = Field(min_length=1)


class RowSource(_Source):
    """Data whose rows are in one of the formats of train/data/formats.py."""

    path: str = Field(min_length=1)
    format: Literal["auto"] | FormatName = "auto"
    """Format of the rows; auto: detected from the first row."""
    columns: dict[str, str] | None = None
    """Columns that hold the keys of the format, where they have other names: {prompt = "question"}."""
    ignore: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Keys of rows and messages to leave out."""
    on_fault: OnFault = "stop"
    """What to do about faulty rows: stop with a message, or leave them out and count them."""

    @field_validator("columns")
    @classmethod
    def _each_column_once(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        if columns and len(set(columns.values())) < len(columns):
            raise ValueError("expected another column for each key")
        return columns


class FileSource(RowSource):
    """A file. `path`: JSONL, JSON, CSV, TSV, text or parquet, relative to the recipe's folder."""

    source: Literal["file"]


class DatasetsSource(RowSource):
    """A data set. `path`: its name on the Hub, a short name of train/known_datasets.toml, or a folder (`./name`)."""

    source: Literal["datasets"]
    subset: str | None = None
    split: str = Field(default="train", min_length=1)
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""

    @model_validator(mode="after")
    def _folders_have_no_revision(self) -> DatasetsSource:
        if self.revision and self.path.startswith((".", "/", "~")):
            raise ValueError(f"path = {self.path!r} is a local folder, which has no revision: leave revision out")
        return self


class ShippedSource(_Source):
    """A data set that comes with adapterhub."""

    source: Literal["shipped"]
    name: str = Field(min_length=1)


class ChatterbotData(_Data, ChatterbotSource):
    """[data] with a topic of the chatterbot corpus."""


class FileData(_Data, FileSource):
    """[data] with a file."""


class DatasetsData(_Data, DatasetsSource):
    """[data] with a data set of the `datasets` library."""


class ShippedData(_Data, ShippedSource):
    """[data] with a shipped data set."""


class FeedbackData(_Data):
    """Feedback on a server's answers. `path`: the feedback store; None: that of this machine."""

    source: Literal["feedback"]
    path: str | None = Field(default=None, min_length=1)
    adapters: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | Literal["all"] | None = None
    """Names and digests of the adapters whose feedback counts; None: those of `start`, or all without `start`."""


class MixData(_Data):
    """Several sources; each is an entry [[data.sources]] with its `weight`."""

    source: Literal["mix"]
    sources: Annotated[
        tuple[
            Annotated[ChatterbotSource | FileSource | DatasetsSource | ShippedSource, Field(discriminator="source")],
            ...,
        ],
        Field(strict=False, min_length=1),
    ]


class LoraSection(_Section):
    """LoRA (arXiv 2106.09685); rsLoRA scales by alpha / sqrt(rank) (2312.03732); DoRA adds magnitudes (2402.09353)."""

    method: Literal["lora", "rslora", "dora"] = "lora"
    init: Literal["default", "pissa", "loftq", "eva"] = "default"
    """Initialization of A and B (train/loop/lora_init.py); the base does not change."""
    rank: int = Field(default=16, ge=1, le=4096)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Targets | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Layers to adapt: all linear layers but the output head, those of attention or of the MLPs; or a list of these
    words, `embeddings`, `head` and names of linear layers (`q_proj`)."""

    @model_validator(mode="after")
    def _starts_on_linear_layers(self) -> LoraSection:
        if self.init != "default" and {"embeddings", "head"} & set(self.targets):
            raise ValueError(
                f"init = {self.init} supports linear layers only: leave embeddings and head out of targets"
            )
        return self


def adapter_size(lora: LoraSection) -> tuple[int, float]:
    """Return (rank, alpha) of the trained adapter: PiSSA doubles the rank, to subtract the initial A and B."""
    if lora.init != "pissa":
        return lora.rank, lora.alpha
    return 2 * lora.rank, lora.alpha * (math.sqrt(2) if lora.method == "rslora" else 2)


class TrainSection(_Section):
    """Length, batches, optimizer and evaluation of a run."""

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    """Number of samples in a forward pass."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Number of forward passes in a step; the loss is the mean over all their trained tokens."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Schedule = "cosine"
    warmup_steps: int = Field(default=5, ge=0)
    max_grad_norm: float = Field(default=0.3, gt=0)
    lora_plus_ratio: float = Field(default=1.0, ge=1)
    """Learning rate of B divided by that of A (LoRA+, arXiv 2402.12354)."""
    neftune_alpha: float = Field(default=0.0, ge=0)
    """Noise on embedded tokens (NEFTune, arXiv 2310.05914); 0: none."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: the same result in less memory, a third slower."""
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"] = "adamw"
    loss_on: LossOn = "assistant"
    """Trained tokens: every answer, the last answer of each conversation, or every token."""
    evaluate_every: int = Field(default=0, ge=0)
    """Number of steps between evaluations of the held-out loss; 0: only before and after the run."""
    keep: Literal["last", "best"] = "last"
    """Weights to keep: those of the last step, or those with the lowest held-out loss."""
    patience: int = Field(default=0, ge=0)
    """Early stopping: number of evaluations without a lower held-out loss after which the run ends; 0: off."""
    group_by_length: bool = False
    """Put samples of similar length into the same step."""
    checkpoint_every: int = Field(default=50, ge=0)
    """Number of steps between checkpoints; 0: only when the run is stopped."""
    sample_every: int = Field(default=0, ge=0)
    """Number of steps between sample answers to `prompts`; the base and the result answer too; 0: none."""
    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=16)] = PROMPTS
    """Prompts of the sample answers."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("expected either epochs or steps")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts evaluations: set evaluate_every too")
        if self.keep == "best" and not self.evaluate_every:
            raise ValueError("keep = best compares evaluations: set evaluate_every too")
        return self

    @property
    def moment_bytes(self) -> int:
        """Size of both optimizer moments of one parameter, in bytes."""
        return 2 if self.optimizer.endswith("8bit") else 8

    def num_steps(self, num_samples: int) -> int:
        """Return the number of steps of a run on this many samples."""
        if self.steps is not None:
            return self.steps
        return (self.epochs or 1) * math.ceil(num_samples / (self.batch_size * self.gradient_accumulation))


class PreferenceSection(_Section):
    """Preference tuning: DPO (arXiv 2305.18290), KTO (2402.01306) or ORPO (2403.07691)."""

    method: PreferenceMethod
    beta: float = Field(default=0.1, gt=0)
    """DPO, KTO: strength of the pull towards the reference model; ORPO: weight of the odds ratio (lambda)."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """KTO's lambda_D, which balances unequal numbers of labels."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """KTO's lambda_U, which balances unequal numbers of labels."""

    @model_validator(mode="after")
    def _weights_are_ktos(self) -> PreferenceSection:
        if self.method != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ValueError(
                f"desirable_weight and undesirable_weight need method = kto, not {self.method}: leave them out"
            )
        return self


class QuantizationSection(_Section):
    """Quantization of the base; every option is passed to bitsandbytes (adapterhub/bases/quantization.py)."""

    kind: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    double_quant: bool = True
    """Quantize the quantization constants too, to 8 bits (nf4 and fp4)."""
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    """Number of weights per quantization constant (nf4 and fp4)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the computation; auto: chosen for the machine."""

    @model_validator(mode="after")
    def _blocks_are_of_4_bit(self) -> QuantizationSection:
        if self.kind in ("int8", "none") and (self.block_size, self.double_quant) != (64, True):
            raise ValueError(f"block_size and double_quant need kind = nf4 or fp4, not {self.kind}: leave them out")
        return self


class Recipe(_Section):
    """A training run as its author wrote it. Relative paths start at `folder`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    base: str
    start: str | None = None
    """Adapter that training starts from: `owner/name`, `name@alias`, a folder, `sha256:...`; None: a new one."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    method: Method = "lora"
    """What is trained: LoRA, a soft prompt (arXiv 2104.08691), a prefix (2101.00190), the output head, every weight."""
    virtual_tokens: int = Field(default=16, ge=1)
    """Number of virtual tokens of a soft prompt or prefix."""
    data: Annotated[
        ChatterbotData | FileData | DatasetsData | FeedbackData | ShippedData | MixData, Field(discriminator="source")
    ]
    lora: LoraSection = LoraSection()
    train: TrainSection
    preference: PreferenceSection | None = None
    """Preference tuning; None: supervised fine-tuning on the answers."""
    quantization: QuantizationSection = QuantizationSection()

    _folder: Path = PrivateAttr(default=Path())

    SECTIONS: ClassVar[dict[str, tuple[type[_Section], ...]]] = {
        "data": (ChatterbotData, FileData, DatasetsData, FeedbackData, ShippedData, MixData),
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
    def _is_consistent(self) -> Recipe:
        if faults := [*self._data_conflicts(), *self.method_conflicts()]:
            raise ValueError("; ".join(faults))
        return self

    def _data_conflicts(self) -> Iterator[str]:
        """Yield the conflicts between [data] and other sections."""
        data, train = self.data, self.train
        format = data.format if isinstance(data, RowSource) else "auto"
        entries = data.sources if isinstance(data, MixData) else (data,)
        has_texts = any(isinstance(entry, RowSource) and entry.format == "text" for entry in entries)
        if isinstance(data, _Source) and data.weight != 1:
            yield "weight divides an epoch between sources: leave it out, or list several in [[data.sources]]"
        if has_texts and train.loss_on != "all":
            yield 'format = "text" has no answers: set loss_on = "all" in [train]'
        if self.preference:
            if not isinstance(data, RowSource | FeedbackData):
                yield "[preference] needs preference data: set source to file, datasets or feedback in [data]"
            if format not in ("auto", "hh-rlhf"):
                yield f"[preference] reads preference pairs and labeled replies, not {format}: leave format out"
            if train.loss_on == "all":
                yield "[preference] trains replies only: leave loss_on out"
        elif isinstance(data, FeedbackData) and train.loss_on == "all":
            yield 'source = "feedback" trains the judged answers only: leave loss_on out'
        if not data.held_out and (train.keep == "best" or train.patience):
            yield "keep = best and patience need held-out questions: set held_out above 0 in [data]"
        elif not data.held_out and train.evaluate_every:
            yield "evaluate_every needs held-out questions: set held_out above 0 in [data]"

    def method_conflicts(self) -> Iterator[str]:
        """Yield the conflicts between the method, [lora] and other sections."""
        is_lora = self.method == "lora"
        if not is_lora and "lora" in self.model_fields_set:
            yield f"[lora] needs method = lora, not {self.method}: leave [lora] out"
        if not is_lora and self.start:
            yield f"start needs method = lora, not {self.method}: leave start out"
        if not is_lora and self.train.lora_plus_ratio != 1:
            yield f"lora_plus_ratio needs method = lora, not {self.method}: leave it out"
        if self.method == "full" and self.quantization.kind != "none":
            yield 'method = full trains every weight, which cannot be quantized: set kind = "none" in [quantization]'
        if self.method == "prefix" and self.train.activation_checkpointing:
            yield "activation_checkpointing drops the keys and values of a prefix: leave it out, or use method = prompt"
        if self.lora.init == "pissa" and self.train.weight_decay:
            yield "init = pissa stores the initial A and B, which weight_decay would shrink: set weight_decay to 0"
        if self.lora.method == "dora" and self.quantization.kind == "int8":
            yield "method = dora reads the weights of the base, as PEFT cannot in int8: set kind to nf4, fp4 or none"
        if self.lora.init == "loftq" and self.quantization.kind not in ("nf4", "fp4"):
            yield f"init = loftq needs kind = nf4 or fp4, not {self.quantization.kind}: leave init out"

    def base_arguments(self) -> dict[str, Any]:
        """Return keyword arguments for `load_base`; dtype None lets it choose."""
        arguments = self.quantization.model_dump()
        dtype = arguments.pop("compute_dtype")
        if dtype == "auto":
            # bf16 weights would lose most updates, which are smaller than half their last digit.
            dtype = "float32" if self.method == "full" else None
        return {"dtype": dtype, **arguments}

    @property
    def base_name(self) -> BaseName:
        """Parsed name of the base."""
        return BaseName.parse(self.base)

    @property
    def folder(self) -> Path:
        """Folder that relative paths start at."""
        return self._folder

    def to_toml(self) -> str:
        """Return the recipe with every default written out; `read_recipe` parses it to an equal recipe."""
        raw = self.model_dump(mode="json", exclude_none=True, exclude=set() if self.method == "lora" else {"lora"})
        return tomlkit.dumps(raw)


def read_recipe(path: Path, *, folder: Path | None = None) -> Recipe:
    """Parse a TOML recipe; relative paths start at `folder`, by default the recipe's own folder.

    Raises RecipeError that lists every fault: section, key, and the nearest known key.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = ", ".join(sorted(shipped_recipes()))
        raise RecipeError(
            f"cannot read {path} ({error.strerror}): expected a recipe file. Correct the path, or name a shipped "
            f"recipe: {names}."
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text ({error}): expected TOML. Convert the file to UTF-8.") from error
    except (ValueError, RecursionError) as error:  # tomllib's own, a number too long, brackets too deep
        raise RecipeError(f"{path} is not TOML ({error}): expected a recipe. Correct the file.") from error
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        faults = [_fault(entry["type"], entry["loc"], entry["msg"], entry.get("input")) for entry in error.errors()]
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise RecipeError(f"{path} has {count}: {'; '.join(dict.fromkeys(faults))}. Correct the recipe.") from error
    recipe._folder = path.parent if folder is None else folder
    return recipe


def find_recipe(named: str) -> Path:
    """Return the path of a recipe file, or of a shipped recipe by its name. Raises RecipeError."""
    path = Path(named)
    if not path.is_file():
        shipped = shipped_recipes()
        if named not in shipped:
            raise RecipeError(f"there is no recipe {named}: expected a file, or one of {', '.join(sorted(shipped))}.")
        path = shipped[named]
    return path


def shipped_recipes() -> dict[str, Path]:
    """Return the path of each recipe that comes with adapterhub, by name."""
    folder = Path(str(package_files("train"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def _fault(kind: str, loc: tuple[int | str, ...], message: str, found: Any) -> str:
    """Describe one fault, without the names of alternatives that pydantic puts into `loc`."""
    section = str(loc[0]) if loc and loc[0] in Recipe.SECTIONS else None
    keys = [part for part in loc if isinstance(part, str) and part in _keys_of(section)]
    where = f"[{section}]" if section else "top level"
    if kind == "extra_forbidden":
        return f"{where}: unknown key {loc[-1]!r}{_nearest_key(str(loc[-1]), section)}"
    if kind == "missing":
        return f"{where}: {loc[-1]} is missing"
    if kind.startswith("union_tag"):
        return f"{where}: source: expected one of chatterbot, datasets, feedback, file, mix, shipped"
    shown = f" = {found!r}" if keys and isinstance(found, str | int | float | bool) else ""
    name = f" {keys[-1]}{shown}:" if keys else ""
    return f"{where}:{name} {message.removeprefix('Value error, ')}"


def _keys_of(section: str | None) -> set[str]:
    if section is None:
        return set(Recipe.model_fields)
    return {key for model in Recipe.SECTIONS[section] for key in model.model_fields}


def _nearest_key(key: str, section: str | None) -> str:
    """Return the nearest known key as a hint, from the same section if possible."""
    for place in (section, None, *Recipe.SECTIONS):
        if near := difflib.get_close_matches(key, _keys_of(place), n=1, cutoff=0.6):
            return f" (nearest: {near[0]} in {f'[{place}]' if place else 'the top level'})"
    return f" (known here: {', '.join(sorted(_keys_of(section)))})"
