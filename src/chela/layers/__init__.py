"""Layers with plain keyword arguments, for use in any model."""

from chela.layers.attention import GatedLinearAttention as GatedLinearAttention
from chela.layers.block import ChelaBlock as ChelaBlock
from chela.layers.chela import ChelaLayer as ChelaLayer
from chela.layers.chela import LayerState as LayerState
from chela.layers.short_long_conv import ShortLongConv as ShortLongConv
from chela.layers.short_long_conv import ShortLongState as ShortLongState
