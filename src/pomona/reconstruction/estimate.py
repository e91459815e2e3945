"""What a reconstruction would make and cost, from the checkpoint's headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from math import prod

import torch

from pomona.evaluation.work import clock, matmul_speed
from pomona.models.dense import (
    Container,
    DenseFamily,
    GatedFFN,
    MixtureLayer,
    MixtureSizes,
    container_of,
)
from pomona.models.placement import Placement
from pomona.reconstruction.passes import PerToken, assembling_work, retraining_work
from pomona.reconstruction.retraining import Retraining
from pomona.reconstruction.retraining.memory import StudentShapes, retraining_bytes
from pomona.reconstruction.router import Fitted
from pomona.reconstruction.settings import ReconstructSettings


@dataclass(frozen=True)
class Estimate:
    """Sizes in parameters, operations per token of a forward pass, memory and work of making it.

    `flops` counts two per weight that a token meets, as is usual, without the attention's products
    between tokens. `peak_bytes` is the dense model (offloaded: its embeddings and one layer's FFN), the
    sums, inputs and experts of as many layers as are made at once and the shard that is being written;
    for retraining the mixture, the teacher, what learns with gradients and moments, and the merged copies
    of weights that learn. Activations are not in it. `seconds` is what `work_flops` take at the speed of
    the device's matrix products, a lower bound. `remarks` are sentences about what was asked for.
    """

    container: str
    sizes: MixtureSizes
    total: int
    active: int
    dense: int
    flops: int
    dense_flops: int
    peak_bytes: int
    work_flops: int
    seconds: float
    remarks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.container}, {self.sizes.experts} experts of {self.sizes.width} channels, "
                f"{self.sizes.active} active, {self.sizes.shared} channels shared",
                f"{self.total:,} parameters, {self.active:,} active per token (dense: {self.dense:,})",
                f"{self.flops:,} FLOPs per token (dense: {self.dense_flops:,})",
                f"{self.peak_bytes / 2**30:.2f} GiB for weights, sums and moments while it is made; "
                "activations and libraries come on top",
                f"{self.work_flops / 1e12:,.1f} TFLOPs of work, at least {clock(self.seconds)} here",
                *self.remarks,
            )
        )


def estimate(
    shapes: Mapping[str, tuple[int, ...]],
    family: DenseFamily,
    settings: ReconstructSettings,
    domains: int,
    placement: Placement,
) -> Estimate:
    """Return the estimate for a dense checkpoint whose tensors have these shapes.

    Raises `PomonaError` where the settings do not fit the model.
    """
    down = family.mlp + ".down_proj.weight"
    layers = next(layer for layer in count() if down.format(layer=layer) not in shapes)
    hidden, channels = shapes[f"{family.mlp.format(layer=0)}.down_proj.weight"]
    dense = sum(prod(shape) for shape in shapes.values())
    sizes = settings.sizes(channels)
    container = container_of(family, sizes)
    total = dense + layers * (_layer(container, sizes, hidden) - 3 * hidden * channels)
    active = total - layers * 3 * hidden * (sizes.experts - sizes.active) * sizes.width
    embedding, block = _embedding(shapes), down.partition("{layer}")[0].format() + "0."
    own = sum(prod(shape) for name, shape in shapes.items() if name.startswith(block))
    every = 2 * (total - embedding) if sizes.experts > 1 else 0
    per = PerToken(2 * (dense - embedding), 2 * own, layers, 2 * (active - embedding), every)
    at_once = placement.at_once(layers)
    work = assembling_work(settings, domains, per, at_once) + retraining_work(settings.retrain, per)
    assembling = _assembling(shapes, layers, hidden, channels, settings, placement)
    student = _student(shapes, layers, hidden, sizes, total)
    peak = _peak(assembling, settings.retrain, student)
    return Estimate(
        container.name,
        sizes,
        total,
        active,
        dense,
        per.active,
        per.dense,
        peak,
        work,
        work / _speed(settings, placement),
        (*settings.remarks(domains), *_checkpointed(assembling, settings.retrain, student, peak)),
    )


def _speed(settings: ReconstructSettings, placement: Placement) -> float:
    """Return FLOPs per second of the device asked for, in the faster type where there are two."""
    kinds = {settings.dtype} | ({settings.retrain.dtype} if settings.retrain else set())
    device = placement.torch_device()
    return max(matmul_speed(device, getattr(torch, kind)) for kind in sorted(kinds))


def _peak(assembling: int, how: Retraining | None, student: StudentShapes) -> int:
    return max(assembling, 0 if how is None else retraining_bytes(how, student))


def _checkpointed(
    assembling: int, how: Retraining | None, student: StudentShapes, peak: int
) -> tuple[str, ...]:
    """Say what checkpointing would do where it saves a tenth or more."""
    if how is None or how.checkpointing:
        return ()
    less = _peak(assembling, replace(how, checkpointing=True), student)
    if less > 0.9 * peak:
        return ()
    return (
        f"with retrain.checkpointing = true {less / 2**30:.2f} GiB: every layer is merged with what it "
        "has learned when it is computed, and not kept",
    )


def _student(
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    hidden: int,
    sizes: MixtureSizes,
    total: int,
) -> StudentShapes:
    """Return what retraining sees of the mixture, whose experts are fused: gate and up are one weight."""
    experts, width = sizes.experts, sizes.width
    factors = 3 * (hidden + width) if experts == 1 else experts * (2 * hidden + 3 * width)
    factors += 3 * (hidden + sizes.shared) if sizes.shared else 0
    return StudentShapes(
        dense=sum(prod(shape) for shape in shapes.values()),
        total=total,
        layers=layers,
        ffn=3 * hidden * (experts * width + sizes.shared),
        factors=factors,
        router=experts * hidden if experts > 1 else 0,
        norms=sum(prod(shape) for name, shape in shapes.items() if name.endswith("norm.weight")),
    )


def _layer(container: Container, sizes: MixtureSizes, hidden: int) -> int:
    """Return the parameters of one layer's FFNs as the container writes them, whatever it adds."""

    def ffn(width: int, biased: bool = False) -> GatedFFN:
        in_WD, out_DW = (torch.empty(s, device="meta") for s in ((width, hidden), (hidden, width)))
        return GatedFFN(in_WD, in_WD, out_DW, out_DW[:, 0] if biased else None)

    experts = [ffn(sizes.width, sizes.biased) for _ in range(sizes.experts)]
    router_ED = torch.empty(sizes.experts, hidden, device="meta")
    layer = MixtureLayer(router_ED, experts, ffn(sizes.shared) if sizes.shared else None)
    return sum(tensor.numel() for _, tensor in container.tensors(0, layer))


def _embedding(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the parameters that are looked up and not multiplied: none where the head uses them."""
    tied = "lm_head.weight" not in shapes
    return 0 if tied else prod(shapes["model.embed_tokens.weight"])


def _assembling(
    shapes: Mapping[str, tuple[int, ...]],
    layers: int,
    hidden: int,
    channels: int,
    settings: ReconstructSettings,
    placement: Placement,
) -> int:
    """Return the bytes held while the mixture is made; the checkpoint's own are taken for two each."""
    size = 2 if settings.dtype == "bfloat16" else 4
    at_once, width = placement.at_once(layers), settings.sizes(channels).width
    dense = size * sum(prod(shape) for shape in shapes.values())
    if placement.offload:
        ends = ("model.embed_tokens.weight", "lm_head.weight")
        kept = sum(prod(shapes[name]) for name in ends if name in shapes)
        dense = size * (kept + 3 * hidden * channels)
    if settings.experts == 1:
        return dense + at_once * 8 * width * (width + hidden) + 2 * placement.shard_bytes
    many = settings.experts if settings.active > 1 else 1
    rounds = settings.specialise.rounds > 0
    pairs = settings.experts * (many + 1) // 2  # float32 each, and as many columns in float32 again
    joint = 4 * width * (pairs * width + 4 * settings.experts * hidden) if rounds else 0
    joint += 8 * settings.experts * width * width * rounds  # the solvers
    drawn = settings.experts * settings.windows * settings.length
    routed = settings.router.tokens * settings.experts if isinstance(settings.router, Fitted) else 0
    tokens = max(settings.specialise.tokens * rounds, routed)
    inputs = size * hidden * min(tokens, drawn)
    experts = size * settings.experts * width * hidden
    sums = at_once * 8 * width * (width + hidden)
    shard = 2 * min(placement.shard_bytes, 2 * layers * 3 * hidden * settings.experts * width)
    return dense + max(sums, joint) + at_once * (inputs + experts) + shard
