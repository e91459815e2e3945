"""From a dense checkpoint and a plan to the tensors of a stock mixture, layer by layer."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from pomona.models.dense import Container, DenseFamily, GatedFFN, MixtureLayer, MixtureSizes
from pomona.models.weights import Checkpoint
from pomona.reconstruction.compensate import Refit
from pomona.reconstruction.specialise import LayerExperts


def mixture_tensors(
    checkpoint: Checkpoint,
    family: DenseFamily,
    container: Container,
    sizes: MixtureSizes,
    shared_LS: Tensor,
    experts: Iterable[LayerExperts],
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the result under its name on disk.

    Attention, embeddings, norms and head are the dense ones; of the FFNs only one layer's are in
    memory at a time, padded with zeros to `sizes`. `experts` come layer by layer.
    """
    prefixes = [family.mlp.format(layer=layer) for layer in range(len(shared_LS))]
    for name in sorted(checkpoint.files):
        if not any(name.startswith(f"{prefix}.") for prefix in prefixes):
            yield name, checkpoint.tensor(name)
    for number, (prefix, made) in enumerate(zip(prefixes, experts, strict=True)):
        layer = _layer(checkpoint, prefix, sizes, shared_LS[number], made)
        yield from container.tensors(number, layer)


def _layer(
    checkpoint: Checkpoint,
    prefix: str,
    sizes: MixtureSizes,
    shared_S: Tensor,
    made: LayerExperts,
) -> MixtureLayer:
    gate_FD = checkpoint.tensor(f"{prefix}.gate_proj.weight")
    up_FD = checkpoint.tensor(f"{prefix}.up_proj.weight")
    kind = gate_FD.dtype

    def expert(keep_W: Tensor, refit: Refit) -> GatedFFN:
        bias_D = None if refit.bias_D is None else refit.bias_D.to(kind)
        down_DW = refit.column_DW.to("cpu", kind)
        return GatedFFN(gate_FD[keep_W], up_FD[keep_W], down_DW, bias_D).padded(sizes.width)

    shared = None
    if len(shared_S):
        down_DF = checkpoint.tensor(f"{prefix}.down_proj.weight")
        shared = GatedFFN(gate_FD[shared_S], up_FD[shared_S], down_DF[:, shared_S].contiguous())
        shared = shared.padded(sizes.shared)
    experts = [expert(*pair) for pair in zip(made.keep_EW, made.refits, strict=True)]
    return MixtureLayer(made.router_ED.to("cpu", kind), experts, shared)
