"""Names of quantiser options for configurations. Imports no torch, which takes seconds."""

from typing import Literal

Grid = Literal["midrise", "midtread"]
ActivationRule = Literal["gaussian", "lloyd_max", "minmax"]
WeightScale = Literal["conditional_mean", "absmean"]
LowRankInit = Literal["svd", "zero"]
