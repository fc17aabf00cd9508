"""The blocks a config asks for: CHELA's, or those of the models it is measured against."""

from chela.config import ModelConfig
from chela.layers import ChelaBlock, ChelaLayer
from chela.models.gla import GatedLinear
from chela.models.transformer import RotaryAttention, TransformerBlock


def make_block(config: ModelConfig) -> ChelaBlock | TransformerBlock:
    """One block of the stack.

    Raises:
        ValueError: the package of a baseline is not installed.
    """
    if config.mixer == "chela":
        return _chela(config)
    mixer = {"transformer": RotaryAttention, "gla": GatedLinear}[config.mixer](config.d_model, heads=config.heads)
    return TransformerBlock(mixer, config.d_model, d_ff=config.d_ff, norm=config.norm, dropout=config.dropout)


def _chela(config: ModelConfig) -> ChelaBlock:
    layer = ChelaLayer(
        config.d_model,
        kernel_length=config.kernel_length,
        d_key=config.d_key,
        d_value=config.d_value,
        heads=config.heads,
        causal=config.causal,
        attention=config.attention,
        attention_norm=config.attention_norm,
        decay=config.decay,
        short_width=config.short_width,
        kernel=config.kernel,
        taps_per_octave=config.taps_per_octave,
        branches=config.branches,
        branch_norm=config.branch_norm,
        squash=config.squash,
        tap_dropout=config.tap_dropout,
        dropout=config.dropout,
    )
    return ChelaBlock(
        layer,
        d_ff=config.d_ff,
        feed_forward=config.feed_forward,
        norm=config.norm,
        prenorm=config.prenorm,
        dropout=config.dropout,
    )
