"""The three operators as pure functions on tensors, each with a reference in plain torch that is its specification."""

from chela.ops.linear_attention import linear_attention as linear_attention
from chela.ops.linear_attention import linear_attention_step as linear_attention_step
from chela.ops.long_conv import long_conv as long_conv
from chela.ops.long_conv import long_conv_online_state as long_conv_online_state
from chela.ops.long_conv import long_conv_step as long_conv_step
from chela.ops.short_conv import short_conv as short_conv
from chela.ops.short_conv import short_conv_step as short_conv_step
