"""LoRA layers: one base matmul for the whole batch, and a low-rank product per segment of rows with one adapter.

    y = W x + scale · s · B A x        LoRA, arXiv 2106.09685, section 4.1; s = alpha / r

Rows arrive ordered by adapter (scheduler), so each adapter's rows are one slice in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adapterhub.bases.nf4 import Nf4Weights, PackedNf4, dense_weight, layer_dtype
from adapterhub.compatibility import Shapes
from adapterhub.errors import AdapterUnsupported, IncompatibleBase
from serve.adapters.weights import EmbeddingUpdate, FullWeight, LowRank, Weights
from serve.local_engine.cpu.kernels import CpuKernels
from serve.local_engine.cpu.memory import HugePages
from serve.local_engine.cpu.structs import LANES, AdapterTable, WeightMatrix, Widths
from serve.local_engine.lora_embedding import LoraEmbedding
from serve.local_engine.lora_segments import LoraSegment, Segments
from serve.local_engine.scheduler import AdapterMix, Batch

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that read the same rows in Llama-like models; with other rows, a group computes again."""
_MODELING = ("transformers.models.", "transformers_modules.")
"""Beginnings of the names of modules that define models; other subclasses of linear layers are quantized ones."""
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes of rows that our kernel updates; torch updates others, in fp32 too."""


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers that take adapters, quantized ones among them, by name.

    A model's own subclass that computes something else (Llama 4's router) is none.
    """
    return {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and _only_multiplies(one)}


def _only_multiplies(layer: nn.Linear) -> bool:
    kind = type(layer)
    if kind.forward is nn.Linear.forward or not kind.__module__.startswith(_MODELING):
        return True
    row = torch.ones(1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    with torch.no_grad():
        product = nn.functional.linear(row, layer.weight, layer.bias)
        try:
            found = layer(row)
        except Exception:  # it takes other rows, as DeepSeek V4's grouped layers do
            return False
    return (
        isinstance(found, torch.Tensor) and found.shape == product.shape and torch.allclose(found, product, rtol=1e-2)
    )


class LinearGroup:
    """Linear layers of the base that share their input, computed together, with the resident adapters beside them."""

    def __init__(
        self,
        index: int,
        layers: Sequence[nn.Linear],
        segments: Segments,
        kernels: CpuKernels | None,
        pages: HugePages,
    ) -> None:
        """Join `layers`; `pages` store their weights, if `kernels` are to read them."""
        self.index = index
        self.layers = layers
        self.widths = [layer.out_features for layer in layers]
        self.dtype = layer_dtype(layers[0])
        self.matrix = _matrix_of(layers, pages) if kernels is not None else None
        self._matmul = self._choose_matmul(kernels)
        self._kernels = kernels
        self._segments = segments
        self._bias = None if layers[0].bias is None else torch.cat([layer.bias.detach().float() for layer in layers])
        self._resident: dict[str, list[tuple[int, LowRank]]] = {}
        """Digest -> (first column of the layer's output, update)."""
        self._whole: dict[str, torch.Tensor] = {}
        """Digest -> the adapter's own weight instead of the base's; head only."""
        self._input: torch.Tensor | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def install(self, digest: str, place: int, change: LowRank | FullWeight) -> None:
        if isinstance(change, LowRank):
            self._resident.setdefault(digest, []).append((sum(self.widths[:place]), change))
        else:
            self._whole[digest] = change.weight

    def remove(self, digest: str) -> None:
        self._resident.pop(digest, None)
        self._whole.pop(digest, None)

    def updates(self, digest: str) -> list[tuple[int, LowRank]]:
        """Return the adapter's updates of this group: (first column of the layer's output, update)."""
        return self._resident.get(digest, [])

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer at `place` for x [..., in]; the group's first layer computes all."""
        if self._input is not x or place == 0:
            rows = self._compute(x.reshape(-1, x.shape[-1]))
            self._outputs = torch.split(rows.view(*x.shape[:-1], sum(self.widths)), self.widths, dim=-1)
            self._input = x
        found = self._outputs[place]
        if place == len(self.widths) - 1:
            self._input, self._outputs = None, ()
        return found

    def _choose_matmul(self, kernels: CpuKernels | None) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.matrix is not None and kernels is not None:
            matrix = self.matrix
            return lambda x: kernels.matmul(matrix, x.contiguous())
        return PackedNf4(self.layers) if PackedNf4.can_pack(self.layers) else self.layers[0]

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [rows, in] of any dtype -> [rows, out] of the same; our kernel computes in fp32."""
        given = x.dtype
        if self.matrix is not None:
            x = x.float()
        y = self._matmul(x)
        # Fitted to no rows, as of an expert that gets none, the segments would lose their adapters.
        if len(x) and any(
            a.digest in self._resident or a.digest in self._whole for s in self._segments.python for a in s.mix
        ):
            self._update(x, y)
        return y.to(given)

    def _update(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._segments.fit(len(x))
        bases = y.clone() if self._whole else y
        if self._kernels is not None and x.shape[-1] % LANES == 0 and x.dtype == y.dtype in _KERNEL_DTYPES:
            self._kernels.low_rank_updates(self._segments.kernel, self.index, x.contiguous(), y, bias=self._bias)
        else:
            for segment in self._segments.python:
                rows = slice(segment.start, segment.end)
                self._update_by_torch(segment, x[rows], y[rows])
        if self._whole:
            self._replace(x, y, bases)

    def _replace(self, x: torch.Tensor, y: torch.Tensor, bases: torch.Tensor) -> None:
        """Update rows whose adapter has a weight of its own: W x + scale · (W' x - W x)."""
        for segment in self._segments.python:
            for adapter in segment.mix:
                if adapter.digest in self._whole:
                    rows = slice(segment.start, segment.end)
                    weight = self._whole[adapter.digest].to(x.dtype)
                    found = nn.functional.linear(
                        x[rows], weight, None if self._bias is None else self._bias.to(x.dtype)
                    )
                    y[rows] += (adapter.scale * (found - bases[rows])).to(y.dtype)

    def _update_by_torch(self, segment: LoraSegment, x: torch.Tensor, y: torch.Tensor) -> None:
        before = y.clone() if self._bias is None else y - self._bias
        for adapter in segment.mix:
            for offset, update in self._resident.get(adapter.digest, ()):
                columns = slice(offset, offset + update.bt.shape[1])
                # fp32 on CPU, where bf16 would also round the hidden values
                dtype = torch.float32 if x.device.type == "cpu" else update.a.dtype
                found = update.scaling * (x.to(dtype) @ update.a.to(dtype).T) @ update.bt.to(dtype)
                if update.magnitude is not None:
                    found = update.magnitude * found + (update.magnitude - 1) * before[:, columns]
                y[:, columns] += (adapter.scale * found).to(y.dtype)


class LoraLinear(nn.Module):
    """Replaces a linear layer of the base; its group does the work."""

    def __init__(self, group: LinearGroup, place: int) -> None:
        super().__init__()
        self.group = group
        self.place = place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., in] -> [..., out]."""
        return self.group.output(self.place, x)

    @property
    def weight(self) -> torch.Tensor:
        """The base's own weight, for models that also read it."""
        layer = self.group.layers[self.place]
        return layer.weight.to(self.group.dtype) if type(layer) is nn.Linear else layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's own bias."""
        return self.group.layers[self.place].bias


class AdapterBank:
    """All linear layers of a model, wrapped, and the resident adapters. Owned by the worker thread."""

    def __init__(self, model: nn.Module, kernels: CpuKernels | None = None) -> None:
        self.device = next(model.parameters()).device
        self.rows = Segments()
        """Segments of the layers, which see every row."""
        self._head_rows = Segments()
        """Segments of the head, which sees only rows that sample."""
        self.groups: list[LinearGroup] = []
        self.places: dict[str, tuple[LinearGroup, int]] = {}
        self._residents: set[str] = set()
        self._tables: dict[str, AdapterTable] = {}
        """Digest -> the adapter's updates as the kernels read them; empty without kernels."""
        self._has_kernels = kernels is not None
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._head = head
        dtype = layer_dtype(head)
        linears = linear_layers(model)
        pages = HugePages()
        for names in _groups(linears, has_kernels=kernels is not None):
            layers = [linears[name] for name in names]
            segments = self._head_rows if layers[0] is head else self.rows
            group = LinearGroup(len(self.groups), layers, segments, kernels, pages)
            self.groups.append(group)
            for place, name in enumerate(names):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, LoraLinear(group, place))
                self.places[name] = (group, place)

        self._widths: Widths = tuple((group.layers[0].in_features, sum(group.widths)) for group in self.groups)
        self.embedding = _wrapped_embedding(model, self.rows, dtype)

    @property
    def shapes(self) -> Shapes:
        """Shape of every module that an adapter can change."""
        found = {name: group.layers[place] for name, (group, place) in self.places.items()}
        shapes = {name: (layer.in_features, layer.out_features) for name, layer in found.items()}
        if self.embedding is not None:
            vocabulary, width = self.embedding[1].weight.shape
            shapes[self.embedding[0]] = (vocabulary, width)
        return shapes

    def begin(self, batch: Batch) -> None:
        """Set the rows of the next forward."""
        mixes = [(chunk, chunk.sequence.request.adapters) for chunk in batch.chunks]
        self.rows.set([(chunk.num_tokens, mix) for chunk, mix in mixes], self._tables)
        self._head_rows.set([(int(chunk.samples), mix) for chunk, mix in mixes], self._tables)

    def begin_one(self, mix: AdapterMix) -> None:
        """Set the adapters of the next forward, whose rows are all of one sequence."""
        self.rows.set_one(mix, self._tables)
        self._head_rows.set_one(mix, self._tables)

    def dtype_of(self, stored: torch.dtype) -> torch.dtype:
        """Return the dtype to store a file's tensor in: on CPU, bf16 unchanged, which halves reads, or fp32."""
        if self.device.type != "cpu":
            return layer_dtype(self.groups[0].layers[0])
        return torch.bfloat16 if stored == torch.bfloat16 else torch.float32

    def prepare(self, name: str, weights: Weights) -> Weights:
        """Return a compatible adapter's weights in the order that a step reads them, with DoRA's norms computed.

        May run beside the worker thread. Raises AdapterUnsupported for whole weights that cannot be replaced and for
        an update that is not of its layer's kind, IncompatibleBase for whole weights that lie the other way round.
        """
        self._check_kinds(name, weights)
        self._check_whole_weights(name, weights)
        ready = {module: self._divided(module, weights[module]) for module in sorted(weights, key=self._order_of)}
        return in_one_block(ready) if self.device.type == "cpu" else ready

    def install(self, digest: str, weights: Weights) -> None:
        """Make an adapter resident, in place of what the digest had; `weights` are from `prepare`. All or nothing."""
        self.remove(digest)
        try:
            for module, change in weights.items():
                self._install_one(digest, module, change)
            if self._has_kernels:
                self._tables[digest] = AdapterTable(self._widths, [list(g.updates(digest)) for g in self.groups])
            self._residents.add(digest)
        except BaseException:
            self.remove(digest)
            raise

    def _install_one(self, digest: str, module: str, change: LowRank | EmbeddingUpdate | FullWeight) -> None:
        if self.embedding is not None and module == self.embedding[0]:
            assert not isinstance(change, LowRank)
            self.embedding[1].install(digest, change)
            return
        assert not isinstance(change, EmbeddingUpdate)
        group, place = self.places[module]
        group.install(digest, place, change)

    def remove(self, digest: str) -> None:
        for group in self.groups:
            group.remove(digest)
        if self.embedding is not None:
            self.embedding[1].remove(digest)
        self._residents.discard(digest)
        self._tables.pop(digest, None)
        for segments in (self.rows, self._head_rows):  # of the last batch, which would keep its adapters in memory
            segments.set((), {})

    def is_resident(self, digest: str) -> bool:
        return digest in self._residents

    def _order_of(self, module: str) -> tuple[int, int]:
        """Return the order in which a step reads modules; the embedding comes first."""
        if module not in self.places:
            return -1, 0
        group, place = self.places[module]
        return group.index, place

    def _divided(self, module: str, change: LowRank | EmbeddingUpdate | FullWeight) -> Any:
        if not isinstance(change, LowRank) or change.magnitude is None:
            return change
        group, place = self.places[module]
        return change.divided(dense_weight(group.layers[place]))

    def _check_kinds(self, name: str, weights: Weights) -> None:
        for module, change in weights.items():
            is_linear = module in self.places
            if isinstance(change, EmbeddingUpdate if is_linear else LowRank):
                kinds = ("an embedding", "a linear layer") if is_linear else ("a linear layer", "an embedding")
                raise AdapterUnsupported(
                    f"adapter {name} has tensors of {kinds[0]} for {module}: this base has {kinds[1]} there. Save it "
                    "with PEFT again."
                )

    def _check_whole_weights(self, name: str, weights: Weights) -> None:
        shapes = self.shapes
        for module, change in weights.items():
            if not isinstance(change, FullWeight):
                continue
            wanted = shapes[module]
            if module in self.places:
                group, place = self.places[module]
                wanted = wanted[::-1]
                if group.layers[place] is not self._head:
                    raise AdapterUnsupported(
                        f"adapter {name} has full weights of {module} (modules_to_save): only the embedding and the "
                        "head may be replaced; train the others with LoRA."
                    )
            found = tuple(change.weight.shape)
            if found != wanted:
                raise IncompatibleBase(
                    f"adapter {name} has {module} as {list(found)}, this base as {list(wanted)}: save it transposed."
                )


def _matrix_of(layers: Sequence[nn.Linear], pages: HugePages) -> WeightMatrix | None:
    """Return the layers' weights as one matrix of the kernels, or None where those do not read them."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias.detach().float() for layer in layers])
    if Nf4Weights.can_join(layers):
        return WeightMatrix(Nf4Weights.join(layers, keep=pages.keep), bias)
    return WeightMatrix(_joined(layers, pages), bias) if _are_dense(layers) else None


def _joined(layers: Sequence[nn.Linear], pages: HugePages) -> torch.Tensor:
    """Join dense weights by rows, in bf16 where that is exact; the layers become views of the result."""
    weight = torch.cat([layer.weight.detach() for layer in layers]) if len(layers) > 1 else layers[0].weight.detach()
    half = weight.bfloat16()
    # Compared in parts, to lower the peak: a head is the largest tensor there is.
    if all(torch.equal(a.float(), b) for a, b in zip(half.chunk(32), weight.chunk(32), strict=True)):
        weight = half
    weight = pages.keep(weight)
    start = 0
    for layer in layers:
        layer.weight.data = weight[start : start + layer.out_features]
        start += layer.out_features
    return weight


def _wrapped_embedding(model: nn.Module, segments: Segments, dtype: torch.dtype) -> tuple[str, LoraEmbedding] | None:
    """Return name and wrapper of the embedding; None for one that does more than a look-up (Gemma's scale)."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if type(embedding) is not nn.Embedding:
        # Tied to a head that may now be stored in bf16: computing in that would round.
        embedding.weight.data = embedding.weight.data.to(dtype)
        return None
    name = next(name for name, module in model.named_modules() if module is embedding)
    wrapper = LoraEmbedding(embedding, segments, dtype)
    model.set_input_embeddings(wrapper)  # type: ignore[operator]
    return name, wrapper


def _are_dense(layers: Sequence[nn.Linear]) -> bool:
    return all(
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and layer.in_features % LANES == 0
        for layer in layers
    )


def _can_join(layers: Sequence[nn.Linear], has_kernels: bool) -> bool:
    same_bias = all((layer.bias is None) == (layers[0].bias is None) for layer in layers)
    return PackedNf4.can_pack(layers) or (
        has_kernels and same_bias and (Nf4Weights.can_join(layers) or _are_dense(layers))
    )


def _groups(linears: dict[str, nn.Linear], *, has_kernels: bool) -> list[list[str]]:
    """Return names of layers to compute together, in the order of a step.

    Layers known to share their input are joined where a kernel can.
    """
    groups = []
    left = dict(linears)
    for name in linears:
        parent, _, child = name.rpartition(".")
        siblings = next((names for names in _SHARED_INPUT if names[0] == child), ())
        names = [f"{parent}.{sibling}" for sibling in siblings]
        if not names or any(n not in left for n in names) or not _can_join([left[n] for n in names], has_kernels):
            continue
        groups.append(names)
        for taken in names:
            del left[taken]
    when = {name: number for number, name in enumerate(linears)}
    return sorted(groups + [[name] for name in left], key=lambda names: when[names[0]])


def in_one_block(weights: Weights) -> Weights:
    """Copy the halves of all low-rank updates one after another, in the given order, on huge pages.

    A decode step reads an adapter from end to end, which is fastest from such memory.
    """
    halves = [half for change in weights.values() if isinstance(change, LowRank) for half in (change.a, change.bt)]
    pages = HugePages(sum(map(HugePages.room_for, halves)))
    return {
        module: replace(change, a=pages.keep(change.a), bt=pages.keep(change.bt))
        if isinstance(change, LowRank)
        else change
        for module, change in weights.items()
    }
