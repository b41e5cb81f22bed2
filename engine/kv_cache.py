"""The paged KV cache of all layers: plain, in float8, or in int8 with a scale for each token's head."""

from dataclasses import dataclass
from typing import Any

import torch

from octavo.engine.config import ModelConfig
from octavo.engine.options import CACHE_DTYPES

DTYPES = dict(zip(CACHE_DTYPES, (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8), strict=True))
"""What a user may call the dtypes of a quantised cache."""


@dataclass(frozen=True)
class KVCache:
    data: torch.Tensor  # [layers, 2, pages, page_size, Hkv, D]
    scales: torch.Tensor | None = None  # of int8: [layers, 2, pages, page_size, Hkv] fp32

    @classmethod
    def empty(
        cls, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> "KVCache":
        shape = (config.num_hidden_layers, 2, num_pages, page_size, config.num_key_value_heads)
        scales = torch.empty(shape, dtype=torch.float32, device=device) if dtype == torch.int8 else None
        return cls(torch.empty(*shape, config.head_dim, dtype=dtype, device=device), scales)

    @staticmethod
    def page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """What one page takes in all layers."""
        a_head = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
        return 2 * config.num_hidden_layers * page_size * config.num_key_value_heads * a_head

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def page_size(self) -> int:
        return self.data.shape[3]

    def layer(
        self, index: int, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The keys and values of a layer, and what octavo's ops take beside them; k_scale and v_scale are float8's."""
        key, value = self.data[index].unbind(0)
        if self.scales is not None:
            key_scale, value_scale = self.scales[index].unbind(0)
            return key, value, dict(key_scale_cache=key_scale, value_scale_cache=value_scale)
        if key.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            return key, value, dict(k_scale=k_scale, v_scale=v_scale)
        return key, value, {}
