"""Puts off Python's full garbage collections while requests are served. No torch here.

A full collection looks at all objects of the process, of which torch brings a million: 70 ms and more, longer than the
device, one step ahead, has work for. Serving makes enough objects to set one off every few seconds. Younger
generations, where nearly all garbage is, are collected as ever.
"""

import gc
from threading import RLock

FACTOR = 100  # so many times as rarely


class FullCollectionsPutOff:
    """While one of these lives, full collections are rare; then they follow as soon as something is collected."""

    _lock = RLock()
    _living = 0
    _thresholds = gc.get_threshold()

    def __init__(self) -> None:
        cls = FullCollectionsPutOff
        with cls._lock:
            cls._living += 1
            if cls._living == 1:
                cls._thresholds = gc.get_threshold()
                gc.set_threshold(*cls._thresholds[:2], cls._thresholds[2] * FACTOR)

    def __del__(self) -> None:
        cls = FullCollectionsPutOff
        with cls._lock:
            cls._living -= 1
            if cls._living == 0:
                gc.set_threshold(*cls._thresholds)
