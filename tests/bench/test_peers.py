"""Where peers are found, and what surrounds their processes."""

import pytest

from octavo.bench import peers


def test_peer_sites(tmp_path):
    assert peers.parse_sites([f"vllm={tmp_path}:{tmp_path}"]) == {"vllm": [str(tmp_path)] * 2}
    for wrong in ("vllm", "vllm=", f"={tmp_path}", "vllm=/no/such/folder"):
        with pytest.raises(ValueError, match="peer-site"):
            peers.parse_sites([wrong])


def test_environment_of_a_child(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    child = peers.environment("vllm", ["site"], tmp_path)
    assert "TRITON_INTERPRET" not in child
    assert child["VLLM_NO_USAGE_STATS"] == "1" and child["VLLM_USE_DEEP_GEMM"] == "1"
    assert child["PYTHONPATH"].split(":") == ["site", str(tmp_path), "mine"]
