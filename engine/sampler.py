"""From logits to the next token, one request's settings a row."""

import torch

from octavo.engine.sequence import Sequence


class Sampler:
    """Greedy and temperature sampling; a seeded request draws the same tokens in any batch."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
        """One token id a sequence from `logits`, `[sequences, vocab]` fp32."""
        scores = logits
        random_rows = [i for i, s in enumerate(sequences) if s.params.temperature > 0]
        if random_rows:
            # argmax(log p + Gumbel noise) draws from p; -log of an exponential variate is Gumbel noise.
            scores = logits.clone()
            for row in random_rows:
                noise = torch.empty(logits.shape[1], dtype=torch.float32, device=self.device)
                noise.exponential_(generator=self._generator(sequences[row]))
                scores[row] = logits[row] / sequences[row].params.temperature - noise.log()
        return scores.argmax(dim=-1).tolist()

    def forget(self, sequence: Sequence) -> None:
        """Drops the state of a finished request."""
        self._generators.pop(sequence.id, None)

    def _generator(self, sequence: Sequence) -> torch.Generator:
        if sequence.id not in self._generators:
            generator = torch.Generator(self.device)
            if sequence.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sequence.params.seed)
            self._generators[sequence.id] = generator
        return self._generators[sequence.id]
