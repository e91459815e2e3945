"""Who holds which rows: partitions by name."""

from pomona.federation.partition.by_category import ByCategory, SomeCategories
from pomona.federation.partition.dealing import Dealt, check_clients
from pomona.federation.partition.dirichlet import Dirichlet, EvenDirichlet
from pomona.federation.partition.iid import IID, SizeSkew
from pomona.federation.partition.protocol import Partition

PARTITIONS: dict[
    str,
    type[ByCategory]
    | type[SomeCategories]
    | type[Dirichlet]
    | type[EvenDirichlet]
    | type[IID]
    | type[SizeSkew],
] = {
    "category": ByCategory,
    "some-categories": SomeCategories,
    "dirichlet": Dirichlet,
    "dirichlet-even": EvenDirichlet,
    "iid": IID,
    "size-skew": SizeSkew,
}

__all__ = [
    "IID",
    "PARTITIONS",
    "ByCategory",
    "Dealt",
    "Dirichlet",
    "EvenDirichlet",
    "Partition",
    "SizeSkew",
    "SomeCategories",
    "check_clients",
]
