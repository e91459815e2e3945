"""From a dense checkpoint and a plan to the tensors of a stock mixture, one at a time."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from pomona.models.dense import DenseFamily
from pomona.models.dense.mixtral import PARTS
from pomona.models.weights import Checkpoint


def mixture_tensors(
    checkpoint: Checkpoint,
    family: DenseFamily,
    keep_LEW: Tensor,
    downs: Sequence[Sequence[Tensor]],
    routers: Sequence[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the mixture under its name on disk.

    Attention, embeddings, norms and head are the dense ones; of the FFNs only one layer's are in
    memory at a time. `downs[l][e]` are the columns [D, W] of layer l's expert e, `routers[l]` the
    rows [E, D].
    """
    prefixes = {family.mlp.format(layer=layer): layer for layer in range(len(keep_LEW))}
    for name in sorted(checkpoint.files):
        if not any(name.startswith(f"{prefix}.") for prefix in prefixes):
            yield name, checkpoint.tensor(name)
    for prefix, layer in prefixes.items():
        gate_FD = checkpoint.tensor(f"{prefix}.gate_proj.weight")
        up_FD = checkpoint.tensor(f"{prefix}.up_proj.weight")
        yield family.router.format(layer=layer), routers[layer].to(gate_FD.dtype)
        for expert, keep_W in enumerate(keep_LEW[layer]):
            parts = {
                "gate_proj": gate_FD[keep_W],
                "up_proj": up_FD[keep_W],
                "down_proj": downs[layer][expert].to(gate_FD.dtype),
            }
            for part, weight in parts.items():
                name = family.expert.format(layer=layer, expert=expert, part=PARTS[part])
                yield name, weight
