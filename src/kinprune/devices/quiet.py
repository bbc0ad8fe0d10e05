"""Quiet: exporters tell of their inner life in warnings, logs and prints; what matters they raise."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

LOGGERS = ("executorch", "onnx_ir", "onnxscript", "torch.export", "torch.fx", "torch.onnx")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warning, log or print of Python code meanwhile; logging is afterwards as it was."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, LOGGERS)]
    levels, handlers = [logger.level for logger in loggers], list(root.handlers)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        printed = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers  # logging.info() and its like give the root logger a handler if it has none
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
