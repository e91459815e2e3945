"""What a reconstruction would make and cost, from the checkpoint's headers alone."""

from collections.abc import Mapping
from dataclasses import dataclass
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
from pomona.reconstruction.retraining import Retraining
from pomona.reconstruction.settings import ReconstructSettings


@dataclass(frozen=True)
class Estimate:
    """Sizes in parameters, operations per token of a forward pass, memory and work of making it.

    `flops` counts two per weight that a token meets, as is usual, without the attention's products
    between tokens. `peak_bytes` is the dense model (offloaded: its embeddings and one layer's FFN), the
    sums, inputs and experts of as many layers as are made at once and the shard that is being written;
    for retraining the mixture, the teacher, gradients and moments. Activations are not in it.
    `seconds` is what `work_flops` take at the speed of this machine's matrix products, a lower bound.
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
    embedding = _embedding(shapes)
    work = _work(settings, domains, 2 * (dense - embedding), 2 * (active - embedding))
    return Estimate(
        container.name,
        sizes,
        total,
        active,
        dense,
        2 * (active - embedding),
        2 * (dense - embedding),
        max(
            _assembling(shapes, layers, hidden, channels, settings, placement),
            _retraining(settings.retrain, dense, total),
        ),
        work,
        work / matmul_speed(),
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
    at_once, width = placement.layers or layers, settings.sizes(channels).width
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
    tokens = max(settings.specialise.tokens * rounds, 4096 * settings.experts)
    inputs = size * hidden * min(tokens, drawn)
    experts = size * settings.experts * width * hidden
    sums = at_once * 8 * width * (width + hidden)
    shard = 2 * min(placement.shard_bytes, 2 * layers * 3 * hidden * settings.experts * width)
    return dense + max(sums, joint) + at_once * (inputs + experts) + shard


def _retraining(how: Retraining | None, dense: int, total: int) -> int:
    if how is None:
        return 0
    size = 2 if how.dtype == "bfloat16" else 4
    teacher = size * dense if how.objective.loss == "distil" else 0
    learning = 12 * total if how.experts.experts == "full" else 0
    return size * total + teacher + learning


def _work(settings: ReconstructSettings, domains: int, dense_flops: int, flops: int) -> int:
    """Return the FLOPs of the passes for calibration, affinity, compensation and retraining.

    The fits of routers and columns, and repeated passes for few layers at once, come on top.
    """
    tokens = settings.windows * settings.length
    passes = domains * tokens + settings.experts * tokens  # calibrate; compensate
    if settings.affinity == "perplexity" and settings.grouping == "affinity":
        passes += domains**2 * settings.affinity_windows * settings.length
    work = passes * dense_flops
    if settings.retrain is not None:
        seen = settings.retrain.router.tokens + settings.retrain.experts.tokens
        teacher = dense_flops if settings.retrain.objective.loss == "distil" else 0
        work += seen * (3 * flops + teacher)
    return work
