"""What a quantiser can be, by name, for configurations. Knows no torch, which takes seconds to import."""

from typing import Literal

Grid = Literal["midrise", "midtread"]
ActivationRule = Literal["gaussian", "lloyd_max", "minmax"]
WeightScale = Literal["conditional_mean", "absmean"]
LowRankInit = Literal["svd", "zero"]
