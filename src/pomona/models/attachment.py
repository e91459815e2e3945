"""What is hooked onto a model, and how it comes off again."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Attachment:
    """Hooks on a frozen model; no parameter of the model is renamed, moved or changed.

    `detach()` removes them; as a context manager it detaches at the end of the block.
    """

    handles: tuple[RemovableHandle, ...] = field(repr=False)

    def detach(self) -> None:
        """Remove every hook; a second call does nothing."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def join_attachments(attachments: Iterable[Attachment]) -> Attachment:
    """Return one attachment that detaches all of them."""
    return Attachment(tuple(handle for each in attachments for handle in each.handles))
