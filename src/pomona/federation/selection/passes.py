"""A client's calibration rows through the unmodified model, one layer's activations at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pomona.data.examples import Batch
from pomona.errors import PomonaError
from pomona.models.attachment import Attachment
from pomona.models.experts import ExpertSite
from pomona.models.placement import device_of
from pomona.models.routing import experts_call
from pomona.shapes import Hidden, Routing, RoutingWeight, TokenMask


@dataclass(frozen=True)
class Seen:
    """One batch at one layer, padding left out: the experts' input and their routed output.

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


def first_rows(batches: Sequence[Batch], rows: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches, on a device, until they have had `rows` rows."""
    for batch in batches:
        if rows <= 0:
            return
        kept = slice(0, rows)
        first = Batch(
            batch.input_ids_BT[kept], batch.attention_mask_BT[kept], batch.label_mask_BT[kept]
        )
        yield first.to(device)
        rows -= len(batch.input_ids_BT)


def watch(
    model: nn.Module,
    sites: Sequence[ExpertSite],
    batches: Sequence[Batch],
    rows: int,
    see: Callable[[int, Seen], None],
) -> None:
    """Run at most `rows` rows once, without gradients, and show `see` every layer as it is computed.

    `see` gets the place of the site in `sites`; nothing that it does not keep outlives its call.
    """
    for batch in first_rows(batches, rows, device_of(model)):
        hooks = [
            site.experts.register_forward_hook(
                _showing(place, batch.attention_mask_BT.bool(), see), with_kwargs=True
            )
            for place, site in enumerate(sites)
        ]
        with Attachment(tuple(hooks)), torch.no_grad():
            model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                use_cache=False,
                logits_to_keep=1,
            )


def _showing(
    place: int, mask_BT: TokenMask, see: Callable[[int, Seen], None]
) -> Callable[..., None]:
    def hook(
        _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> None:
        mask_N = mask_BT.flatten()
        x_ND, index_NK, weight_NK = (value[mask_N] for value in experts_call(args, kwargs))
        see(place, Seen(x_ND, index_NK, weight_NK, output[mask_N]))

    return hook


def best(score_E: Tensor, count: int) -> list[int]:
    """Return the `count` experts with the highest scores, best first, of equals the lower index."""
    return score_E.argsort(descending=True, stable=True)[:count].tolist()
