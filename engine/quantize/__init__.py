"""Quantising a model: `octavo quantize`, and the same from Python.

    from octavo.engine.quantize import Settings, quantize
    report = quantize("meta-llama/Llama-3.1-8B", "llama-int4", Settings("int4"))

Layer by layer (`forward.py`), so that a model larger than the GPU fits; each finished layer is a file (`writer.py`), so
that an interrupted run goes on where it was. `gptq.py`, `smooth.py` and `rounding.py` are the methods, `mixture.py`
what experts have of their own.
"""

from octavo.engine.quantize.run import Report, quantize
from octavo.engine.quantize.settings import Settings

__all__ = ["Report", "Settings", "quantize"]
