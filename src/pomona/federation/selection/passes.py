"""Clients' calibration rows through the unmodified model, all together, one layer's activations at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from pomona.data.examples import Batch
from pomona.errors import PomonaError
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.placement import device_of
from pomona.models.routing import experts_call
from pomona.shapes import Hidden, Routing, RoutingWeight

_ROWS = 32  # of all clients in one pass


@dataclass(frozen=True)
class Seen:
    """One client's batch at one layer, padding left out: the experts' input and their routed output.

    `routed_ND` is F(x), without a shared expert; token n is sent to the experts `index_NK` with the
    weights `weight_NK`.
    """

    x_ND: Hidden = field(repr=False)
    index_NK: Routing = field(repr=False)
    weight_NK: RoutingWeight = field(repr=False)
    routed_ND: Hidden = field(repr=False)

    def sent_to(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return the tokens that are routed to an expert, [n], and its weights for them, [n]."""
        token_n, slot_n = (self.index_NK == expert).nonzero(as_tuple=True)
        return token_n, self.weight_NK[token_n, slot_n]


def check_rows(rows: int) -> None:
    """Raise `PomonaError` when there would be no calibration row."""
    if rows < 1:
        raise PomonaError(f"selection rows {rows} is not positive; use for example 128")


@dataclass(frozen=True)
class Pass:
    """A batch of each of some clients in one, client-major; `sizes` are their rows."""

    clients: tuple[int, ...]
    sizes: tuple[int, ...]
    batch: Batch = field(repr=False)

    def each(self) -> Iterator[tuple[int, slice]]:
        """Yield every client with the place of its tokens among those of the pass [B · T]."""
        length, end = self.batch.input_ids_BT.shape[1], 0
        for client, rows in zip(self.clients, self.sizes, strict=True):
            yield client, slice(end, end + rows * length)
            end += rows * length


def shared_passes(
    clients: Sequence[Sequence[Batch]], rows: int, device: torch.device
) -> Iterator[Pass]:
    """Yield the batches of all clients, on a device, until each has had `rows` rows.

    A client has one batch in a pass at most: what a rule computes of a batch is the client's own.
    """
    first = [list(_first_rows(batches, rows)) for batches in clients]
    for place in range(max(map(len, first), default=0)):
        waiting = [c for c, batches in enumerate(first) if place < len(batches)]
        while waiting:
            sizes = [len(first[c][place].input_ids_BT) for c in waiting]
            ends = list(accumulate(sizes))
            count = max(1, sum(end <= _ROWS for end in ends))
            batch = _joined([first[c][place] for c in waiting[:count]])
            yield Pass(tuple(waiting[:count]), tuple(sizes[:count]), batch.to(device))
            waiting = waiting[count:]


def _first_rows(batches: Sequence[Batch], rows: int) -> Iterator[Batch]:
    for batch in batches:
        if rows <= 0:
            return
        kept = slice(0, rows)
        yield Batch(
            batch.input_ids_BT[kept], batch.attention_mask_BT[kept], batch.label_mask_BT[kept]
        )
        rows -= len(batch.input_ids_BT)


def _joined(batches: Sequence[Batch]) -> Batch:
    """Return batches below each other, padded on the right to the longest."""
    longest = max(batch.input_ids_BT.shape[1] for batch in batches)

    def below(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([fn.pad(part, (0, longest - part.shape[1])) for part in parts])

    return Batch(
        below([batch.input_ids_BT for batch in batches]),
        below([batch.attention_mask_BT for batch in batches]),
        below([batch.label_mask_BT for batch in batches]),
    )


def watch(
    model: nn.Module,
    sites: Sequence[ExpertSite],
    clients: Sequence[Sequence[Batch]],
    rows: int,
    see: Callable[[int, int, Seen], None],
) -> None:
    """Run at most `rows` rows of every client once, without gradients, and show `see` every layer.

    `see` gets the place of the client in `clients`, that of the site in `sites`, and one batch of that client
    as the layer computes it; nothing that it does not keep outlives its call.
    """
    for one in shared_passes(clients, rows, device_of(model)):
        hooks = [
            site.experts.register_forward_hook(_showing(place, one, see), with_kwargs=True)
            for place, site in enumerate(sites)
        ]
        with Attachment(tuple(hooks)), torch.no_grad():
            model(
                input_ids=one.batch.input_ids_BT,
                attention_mask=one.batch.attention_mask_BT,
                use_cache=False,
                logits_to_keep=1,
            )


def _showing(place: int, one: Pass, see: Callable[[int, int, Seen], None]) -> Callable[..., None]:
    real_N = one.batch.attention_mask_BT.bool().flatten()

    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        x_ND, index_NK, weight_NK = experts_call(args, kwargs)
        for client, own in one.each():
            mask_n = real_N[own]
            seen = [value[own][mask_n] for value in (x_ND, index_NK, weight_NK, output)]
            see(client, place, Seen(*seen))

    return hook


def no_sums(sites: Sequence[ExpertSite], clients: Sequence[object]) -> list[list[Tensor]]:
    """Return zeros for every client, site and expert, float64 [E] each."""
    return [[torch.zeros(site.num_experts, dtype=torch.float64) for site in sites] for _ in clients]


def best(score_E: Tensor, count: int) -> list[int]:
    """Return the `count` experts with the highest scores, best first, of equals the lower index."""
    return score_E.argsort(descending=True, stable=True)[:count].tolist()
