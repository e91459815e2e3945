"""What nothing hangs on, compiled: the normalisations of a model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pomona.errors import PomonaError
from pomona.models.placement import device_of


def compile_norms(model: PreTrainedModel) -> None:
    """Have torch compile every normalisation, whose few operations on all tokens then are one.

    LoRA, grafts and counts hang on other modules and change from stage to stage; those stay as they are. The
    first pass takes longer, and results differ in their last bits. Raises `PomonaError` where torch has no
    compiler here.
    """
    norms = [module for module in model.modules() if _only_scales(module)]
    for norm in norms:
        norm.compile(dynamic=True)
    try:
        torch.compile(_probe)(torch.ones(2, device=device_of(model)))
    except Exception as error:  # of the compiler, whatever it is
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise PomonaError(
            f"compile = true, but torch cannot compile here ({last[0]}); install what torch.compile "
            "needs (for a processor a C++ compiler), or leave compile out"
        ) from error


def _probe(x: Tensor) -> Tensor:
    return x * x + 1


def _only_scales(module: nn.Module) -> bool:
    """Tell a normalisation by what it holds: a weight per feature, perhaps a bias, nothing inside."""
    parameters = list(module.parameters())
    return not list(module.children()) and bool(parameters) and all(p.ndim == 1 for p in parameters)
