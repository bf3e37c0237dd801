"""Building blocks of the necks; they know tensors, not pyramids."""

from a2fpn.layers.attention import ATTENTION_KINDS, AttentionKind, attend
from a2fpn.layers.context import MGC, orthogonality
from a2fpn.layers.conv import ConvNormAct
from a2fpn.layers.reassemble import CARAFE, GACAP, GACARAFE, reassemble
from a2fpn.layers.resample import resample

__all__ = [
    "ATTENTION_KINDS",
    "CARAFE",
    "GACAP",
    "GACARAFE",
    "MGC",
    "AttentionKind",
    "ConvNormAct",
    "attend",
    "orthogonality",
    "reassemble",
    "resample",
]
