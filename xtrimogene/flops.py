"""FLOPs of a model on cells of given lengths, and of a padded, a dense and a Performer one, in closed form."""

from xtrimogene.network.flops import (
    DecoderFlopCount,
    FlopCount,
    decoder_backward_flops,
    decoder_flops,
    dense_autoencoder_flops,
    dense_flops,
    encoder_backward_flops,
    encoder_flops,
    executed_share,
    padded_flops,
    performer_flops,
    step_flops,
)

__all__ = [
    "DecoderFlopCount",
    "FlopCount",
    "decoder_backward_flops",
    "decoder_flops",
    "dense_autoencoder_flops",
    "dense_flops",
    "encoder_backward_flops",
    "encoder_flops",
    "executed_share",
    "padded_flops",
    "performer_flops",
    "step_flops",
]
