"""The least that drives a runner, a step ahead of what is known, and models to drive it with."""

import torch

from octavo.engine.block_manager import BlockManager
from octavo.engine.checkpoint import open_checkpoint
from octavo.engine.loader import load_model
from octavo.engine.params import SamplingParams
from octavo.engine.runner import ModelRunner
from octavo.engine.scheduler import Scheduler
from octavo.engine.sequence import Sequence

LIMITS = dict(max_num_seqs=6, max_num_batched_tokens=64, max_model_len=128)


def load(folder, device="cpu", dtype=torch.float32, max_model_len=128):
    return load_model(open_checkpoint(str(folder)), torch.device(device), dtype, max_model_len, None)


class Stepping:
    """A scheduler and a runner.

    `poison`: what the cache holds where nothing was written is NaN.
    """

    def __init__(self, model, num_pages=64, page_size=4, ring_pages=None, caching=False, poison=True, **options):
        limits = LIMITS | {name: options.pop(name) for name in LIMITS if name in options}
        blocks = BlockManager(num_pages, page_size, enable_prefix_caching=caching, ring_pages=ring_pages)
        self.scheduler = Scheduler(blocks, limits["max_num_seqs"], limits["max_num_batched_tokens"])
        self.runner = ModelRunner(
            model, num_pages=num_pages, page_size=page_size, ring_pages=ring_pages, **limits, **options
        )
        if poison and self.runner.cache.data.dtype.itemsize > 1:
            self.runner.cache.data.fill_(torch.nan)
        self.results = {}
        self._pending = None
        self._ids = 0

    def add(self, prompt, priority=0, stop_token_ids=(), **params):
        self._ids += 1
        params = SamplingParams(**dict(max_tokens=8, temperature=0.0) | params)
        sequence = Sequence(
            self._ids, list(prompt), params, 0, frozenset(stop_token_ids), priority=priority, arrival=self._ids
        )
        self.scheduler.add(sequence)
        self.results[sequence.id] = []
        return sequence

    def step(self):
        """Schedules and starts a step, then waits for the one before."""
        step = self.scheduler.schedule()
        started = (step, self.runner.start(step)) if step.chunks else None
        if self._pending is not None:
            step, pending = self._pending
            chunks = [chunk for chunk in step.chunks if chunk.samples]
            for chunk, sampled in zip(chunks, pending.wait(), strict=True):
                if self.scheduler.update(chunk, sampled.token_id):
                    self.results[chunk.sequence.id].append(sampled)
                    if len(chunk.sequence.token_ids) >= chunk.sequence.max_length:
                        self.scheduler.finish(chunk.sequence, "length")
                        self.runner.forget(chunk.sequence)
        self._pending = started

    def run(self):
        """Until all have ended."""
        while self.scheduler.has_work or self._pending is not None:
            self.step()
        assert self.scheduler.blocks.num_used == 0

    def generate(self, prompts, **params):
        sequences = [self.add(prompt, **params) for prompt in prompts]
        self.run()
        return [sequence.generated for sequence in sequences]
