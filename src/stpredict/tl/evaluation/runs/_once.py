"""What every fit finds is said once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from scanpy import settings


@contextmanager
def said_once() -> Iterator[None]:
    """Have scanpy's logger leave out what it has said since this began, such as that the same spots lie off the image."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in said:
            return False
        said.add(message)
        return True

    logger = settings._root_logger
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
