"""From a dense checkpoint and a plan to the tensors of a stock mixture, layer by layer."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pomona.models.dense import Container, DenseFamily, GatedFFN, MixtureLayer, MixtureSizes
from pomona.models.weights import Checkpoint
from pomona.reconstruction.compensate import Refit
from pomona.reconstruction.plan import ExpertPlan


def mixture_tensors(
    checkpoint: Checkpoint,
    family: DenseFamily,
    container: Container,
    sizes: MixtureSizes,
    plan: ExpertPlan,
    refits: Sequence[Sequence[Refit]],
    routers: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the result under its name on disk.

    Attention, embeddings, norms and head are the dense ones; of the FFNs only one layer's are in
    memory at a time, padded with zeros to `sizes`.

    `refits[l][e]` are layer l's of expert e, `routers[l]` the rows [E, D].
    """
    prefixes = [family.mlp.format(layer=layer) for layer in range(len(plan.keep_LEW))]
    for name in sorted(checkpoint.files):
        if not any(name.startswith(f"{prefix}.") for prefix in prefixes):
            yield name, checkpoint.tensor(name)
    for number, prefix in enumerate(prefixes):
        layer = _layer(checkpoint, prefix, sizes, plan, number, refits[number], routers[number])
        yield from container.tensors(number, layer)


def _layer(
    checkpoint: Checkpoint,
    prefix: str,
    sizes: MixtureSizes,
    plan: ExpertPlan,
    number: int,
    refits: Sequence[Refit],
    router_ED: Tensor,
) -> MixtureLayer:
    gate_FD = checkpoint.tensor(f"{prefix}.gate_proj.weight")
    up_FD = checkpoint.tensor(f"{prefix}.up_proj.weight")
    kind = gate_FD.dtype

    def expert(keep_W: Tensor, refit: Refit) -> GatedFFN:
        bias_D = None if refit.bias_D is None else refit.bias_D.to(kind)
        down_DW = (refit.column_DW * plan.gain).to(kind)
        return GatedFFN(gate_FD[keep_W], up_FD[keep_W], down_DW, bias_D).padded(sizes.width)

    shared_S = plan.shared_LS[number]
    shared = None
    if len(shared_S):
        down_DF = checkpoint.tensor(f"{prefix}.down_proj.weight")
        shared = GatedFFN(gate_FD[shared_S], up_FD[shared_S], down_DF[:, shared_S].contiguous())
        shared = shared.padded(sizes.shared)
    pairs = zip(plan.keep_LEW[number], refits, strict=True)
    experts = [expert(keep_W, refit) for keep_W, refit in pairs]
    return MixtureLayer(router_ED.to(kind), experts, shared)


def no_router(layers: int, size: int) -> list[Tensor]:
    """Return the router rows of a single expert, which nobody reads."""
    return [torch.zeros(1, size) for _ in range(layers)]
