"""Building blocks of the necks, on plain tensors."""

from a2fpn.layers.attention import ATTENTION_KINDS, AttentionKind, attend, attention_map
from a2fpn.layers.context import MGC, ContextInit, Distribution, orthogonality
from a2fpn.layers.conv import ConvNormAct
from a2fpn.layers.dysample import DySample
from a2fpn.layers.fusion import CARAFE, GACAP, GACARAFE, KernelGrid, KernelInit, Pooling
from a2fpn.layers.levels import LevelModules, LevelParameters, positional_keys
from a2fpn.layers.reasoning import ReasoningKind
from a2fpn.layers.reassemble import reassemble
from a2fpn.layers.resample import resample

__all__ = [
    "ATTENTION_KINDS",
    "CARAFE",
    "GACAP",
    "GACARAFE",
    "MGC",
    "AttentionKind",
    "ContextInit",
    "ConvNormAct",
    "Distribution",
    "DySample",
    "KernelGrid",
    "KernelInit",
    "LevelModules",
    "LevelParameters",
    "Pooling",
    "ReasoningKind",
    "attend",
    "attention_map",
    "orthogonality",
    "positional_keys",
    "reassemble",
    "resample",
]
