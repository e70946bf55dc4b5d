"""What torch means when a derivative fails."""

import re

_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"use_reentrant=True|Checkpointing is not compatible with \.grad|torch\.utils\.checkpoint.*not compatible",
        "The model uses reentrant activation checkpointing, which cannot be differentiated twice: call checkpoint(..., "
        "use_reentrant=False), with transformers gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it "
        "off; --curvature forward works without derivatives.",
    ),
    (
        r"aot_autograd does not currently support double backward|torch\.compile with.*double backward",
        "A compiled function has no double backward: pass the uncompiled model and loss, or set "
        "TORCHDYNAMO_DISABLE=1; --curvature forward works without derivatives.",
    ),
    (
        r"(flash|efficient|cudnn|fused)_?.*attention.*backward|scaled_dot_product.*backward|FlashAttn|flash_attn",
        "A fused attention kernel has no second derivative: use attn_implementation='eager' with transformers, or "
        "scaled_dot_product_attention without a kernel chosen by hand; --curvature forward works without derivatives.",
    ),
    (
        r"_?cudnn_rnn|mkldnn_rnn_layer|_thnn_fused_(lstm|gru)",
        "A fused recurrent kernel has no such derivative: run the forward pass under torch.backends.cudnn.flags("
        "enabled=False), use --hvp double-backward, or --curvature forward, which works without derivatives.",
    ),
    (
        r"derivative for '?(aten::)?[\w:]+'? is not implemented|is not differentiable twice|once_differentiable"
        r"|marked with @once_differentiable|trying to differentiate twice a function",
        "An operation in the loss has no second derivative: replace it (for example embedding_bag by embedding and a "
        "mean, cdist by (x[:, None] - y).square().sum(-1); ctc_loss has none at all), or use --curvature forward, "
        "which works without derivatives.",
    ),
    (
        r"modified by an inplace operation",
        "The loss, or a layer, changes a tensor in place that its own derivative needs: write it out of place, "
        "for example x = x + y instead of x += y, nn.ReLU() instead of nn.ReLU(inplace=True).",
    ),
    (
        r"Inference tensors cannot be saved for backward",
        "A tensor made under torch.inference_mode() takes part in the loss: make it outside, or clone() it.",
    ),
)


def explain_autograd_error(error: BaseException) -> str | None:
    """One sentence with the cause and the remedy for an error of a first or second derivative.

    Returns:
        None for an error that is not known to come from differentiation.
    """
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    for pattern, remedy in _REMEDIES:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            return remedy
    return None
