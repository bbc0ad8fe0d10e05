"""Precision: how a model on a device stores the numbers of its weights."""

from __future__ import annotations

from typing import Literal, get_args

Precision = Literal["fp32", "fp16", "int8"]
"""*fp32* as PyTorch has them; *fp16* half of that; *int8* the weights of convolutions and matrix products in a byte
each, with a scale a channel, the rest as in *fp32*."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
