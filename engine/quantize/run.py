"""Quantising a checkpoint from its first layer to its last."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import octavo
from octavo.engine.checkpoint import Checkpoint, FolderCheckpoint, open_checkpoint, read_json
from octavo.engine.config import ModelConfig
from octavo.engine.devices import choose_device, choose_dtype
from octavo.engine.hub import resolve
from octavo.engine.layers import dequantize
from octavo.engine.quantize.evaluate import layerwise_perplexity, sequences_of
from octavo.engine.quantize.forward import Forward, Stream, cut
from octavo.engine.quantize.layer import LayerQuantizer
from octavo.engine.quantize.settings import Settings
from octavo.engine.quantize.source import layer_names, layer_weights, outer_weights
from octavo.engine.quantize.writer import Folder, copy_tokenizer

OUTER = "outer"  # the part of what belongs to no layer
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Report:
    """What became of a model.

    `layers` holds for each weight its name, `error`, the root mean square of what rounding changed over that of the
    weight, and after GPTQ `output_error`, the same of the layer's outputs in calibration (of v what attention makes of
    them), or `kept` where it was not quantised; of an expert's weights also how many `tokens` of the calibration it
    saw, and `rounded` where those were too few for GPTQ. `perplexity_before` is the source's as it is stored,
    `perplexity_after` that of the result on the ops that serve it; None without a text.
    """

    settings: dict[str, Any]
    layers: list[dict[str, Any]]
    calibration_tokens: int
    evaluation_tokens: int
    perplexity_before: float | None
    perplexity_after: float | None
    bytes_before: int
    bytes_after: int
    device: str
    seconds: float


def default_calibration() -> str:
    """The text that comes with octavo: `text/README.md` says what it is."""
    return (files(__package__) / "text/calibration.txt").read_text(encoding="utf-8")


def quantize(
    source: str,
    target: str | Path,
    settings: Settings,
    *,
    calibration: str | None = None,
    evaluation: str | None = None,
    device: str | torch.device | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Report:
    """Quantises a model and writes it as a compressed-tensors checkpoint, which octavo, vLLM and transformers load.

    Args:
        source: what `LLM` takes: a folder, a `.gguf` file, a Hugging Face id. Weights that are quantised already are
            dequantised and quantised anew.
        target: a folder, new or empty, or one that an interrupted call left: then its finished layers are kept. On the
            same device the result has the bits that it would have had without the interruption.
        settings: the scheme and its options.
        calibration: a text such as the model will see; octavo's own by default.
        evaluation: a text whose perplexity is reported before and after; None for no such report. Not the calibration
            text, which the result was fitted to.
        device: as in `LLM`. One layer's weights are on it at a time, and half a layer's Hessians.
        shard_bytes: of a file of weights at most, unless one layer has more.
        progress: called with (layers done, layers in all, what is at work); each perplexity counts all layers again.

    Returns:
        The report, which is in `target/quantize_report.json` too.

    Raises:
        FileNotFoundError: no such model.
        ValueError: a model, setting or text that does not fit, a target with other files or of other settings.
    """
    start = time.monotonic()
    checkpoint = open_checkpoint(resolve(str(source)))
    settings.check(checkpoint.config)
    run = _Run(checkpoint, settings, choose_device(device))
    calibrated = run.calibration(default_calibration() if calibration is None else calibration)
    evaluated = [] if evaluation is None else sequences_of(checkpoint, evaluation)
    steps = _Steps(progress, checkpoint.config.num_hidden_layers * (3 if evaluated else 1))
    folder = Folder(Path(target), run.state(calibrated))
    with torch.inference_mode():
        run.layers(folder, calibrated, steps)
    parts = [OUTER, *layer_names(checkpoint)]
    size = folder.assemble(parts, shard_bytes)
    run.write_tokenizer(folder.path)
    folder.write_config(run.configuration())
    perplexity = [
        layerwise_perplexity(model, evaluated, run.device, partial(steps.next, f"perplexity {when}"))
        for when, model in (("before", checkpoint), ("after", open_checkpoint(folder.path)))
        if evaluated
    ]
    report = Report(
        settings=settings.effective(),
        layers=[row for part in parts for row in folder.report(part)],
        calibration_tokens=sum(map(len, calibrated)),
        evaluation_tokens=sum(map(len, evaluated)),
        perplexity_before=perplexity[0] if perplexity else None,
        perplexity_after=perplexity[1] if perplexity else None,
        bytes_before=checkpoint.num_bytes,
        bytes_after=size,
        device=torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        seconds=round(time.monotonic() - start, 1),
    )
    folder.finish(asdict(report))
    return report


class _Steps:
    """Counts layers: once to be quantised, twice more where perplexities are asked for."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.begun = progress, total, 0

    def next(self, what: str, name: str) -> None:
        self.begun += 1
        self.at(what, name)

    def at(self, what: str, name: str) -> None:
        if self.progress is not None:
            self.progress(self.begun - 1, self.total, f"{what} {name.removeprefix('model.')}")


class _Run:
    def __init__(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> None:
        self.checkpoint, self.settings, self.device = checkpoint, settings, device
        self.config: ModelConfig = checkpoint.config
        self.dtype = choose_dtype(self.config, device)

    def calibration(self, text: str) -> list[list[int]]:
        """The sequences to calibrate on; none where the settings need none."""
        if not self.settings.calibrates:
            return []
        token_ids = self.checkpoint.tokenizer().encode(text)
        length = min(self.settings.sequence_length, self.config.max_position_embeddings)
        sequences = cut(token_ids, length, self.settings.calibration_tokens)
        if not sequences:
            raise ValueError(f"calibration: {len(token_ids)} tokens; expected a text of at least two")
        return sequences

    def state(self, calibrated: list[list[int]]) -> dict[str, Any]:
        """What decides the result."""
        path = self.checkpoint.path
        weights = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        stamps = {weight.name: [weight.stat().st_size, weight.stat().st_mtime_ns] for weight in weights}
        source = {"path": str(path.resolve()), "files": stamps}
        tokens = hashlib.sha256(repr(calibrated).encode()).hexdigest() if calibrated else None
        return {"octavo": octavo.__version__, "source": source} | self.settings.effective() | {"calibration": tokens}

    def layers(self, folder: Folder, calibrated: list[list[int]], steps: _Steps) -> None:
        """Finishes every part."""
        if not folder.has(OUTER):
            cpu = torch.device("cpu")
            outer = {n: dequantize(w, cpu).to(self.config.dtype) for n, w in outer_weights(self.checkpoint).items()}
            folder.write(OUTER, outer, [])
        forward = Forward(self.config, self.device, max(map(len, [*calibrated, [0]])))
        quantizer = LayerQuantizer(self.settings, forward, self.config.dtype, self.dtype)
        calibration = None
        if calibrated:
            embedding = folder.read(OUTER)["model.embed_tokens.weight"].to(self.dtype)
            calibration = Stream(calibrated, embedding, self.device)
        for name in layer_names(self.checkpoint):
            steps.next("quantizing", name)
            if not folder.has(name):
                weights = layer_weights(self.checkpoint, name)
                folder.write(name, *quantizer.quantize(name, weights, calibration, partial(steps.at, "quantizing")))
            elif calibration is not None:
                calibration.advance(partial(forward.layer, quantizer.halves(name, folder.read(name))))

    def configuration(self) -> dict[str, Any]:
        """config.json of the result."""
        if isinstance(self.checkpoint, FolderCheckpoint):
            config = read_json(self.checkpoint.path / "config.json")
            for key in ("quantization_config", "compression_config"):
                config.pop(key, None)
        else:
            config = self.config.to_hf()
        ignored, weights_only = self.settings.ignored(self.config), self.settings.by_weights_only(self.config)
        return config | {"quantization_config": self.settings.quantization_config(ignored, weights_only)}

    def write_tokenizer(self, folder: Path) -> None:
        if isinstance(self.checkpoint, FolderCheckpoint):
            copy_tokenizer(self.checkpoint.path, folder)
        else:
            self.checkpoint.tokenizer().save(folder)
