"""The methods table: every stage a recipe can name."""

from diffpress.distill.consistency import Consistency
from diffpress.distill.guidance import Guidance
from diffpress.distill.recover import Recover
from diffpress.distill.reflow import Reflow
from diffpress.prune.depth import Depth
from diffpress.prune.schedule import ScheduleSearch
from diffpress.prune.steps import Steps
from diffpress.prune.tokens import Tokens
from diffpress.prune.width import Width
from diffpress.quantize.int8 import Int8
from diffpress.quantize.reparam import Reparam
from diffpress.quantize.smooth import Smooth
from diffpress.quantize.weights import Weights
from diffpress.stage import Stage

METHODS: dict[str, type[Stage]] = {
    "distill.consistency": Consistency,
    "distill.guidance": Guidance,
    "distill.reflow": Reflow,
    "prune.depth": Depth,
    "prune.recover": Recover,
    "prune.schedule": ScheduleSearch,
    "prune.steps": Steps,
    "prune.tokens": Tokens,
    "prune.width": Width,
    "quantize.int8": Int8,
    "quantize.reparam": Reparam,
    "quantize.smooth": Smooth,
    "quantize.weights": Weights,
}
