"""The one legend of dimensions; every suffix on a local or argument comes from here.

B rows of a batch · T tokens per row · N tokens in all (B·T, rows after one another) · S tokens per
client (N/C) · D model width · F dense FFN width · W kept width per expert · E experts per layer ·
K experts per token · L layers · V vocabulary · M calibration domains · C clients · R LoRA rank ·
Z labelled tokens of a batch · G grafts per layer · n tokens that are sent to one expert

`keep_LEW` is a tensor [L, E, W]. Suffixes never appear on parameters or in checkpoints. The aliases
below are checked at run time in tests only (`pytest
--jaxtyping-packages=pomona,shape_checks.checked`, which is the default there).
"""

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens: TypeAlias = Int[Tensor, "B T"]
TokenMask: TypeAlias = Bool[Tensor, "B T"]
AttentionMask: TypeAlias = Int[Tensor, "B T"]
Hidden: TypeAlias = Float[Tensor, "N D"]
Activation: TypeAlias = Float[Tensor, "N F"]
Routing: TypeAlias = Int[Tensor, "N K"]
RoutingWeight: TypeAlias = Float[Tensor, "N K"]
PerChannel: TypeAlias = Float[Tensor, " F"]
PerLayerChannel: TypeAlias = Float[Tensor, "L F"]
DownProj: TypeAlias = Float[Tensor, "D F"]
Affinity: TypeAlias = Float[Tensor, "M M"]
KeptChannels: TypeAlias = Int[Tensor, "L E W"]
PerClient: TypeAlias = Float[Tensor, " C"]
