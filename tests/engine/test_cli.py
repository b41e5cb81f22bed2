"""The command as a user types it: text on stdout, the rest on stderr, exit code 2 and one line for a mistake."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from rich.text import Text
from safetensors.torch import load_file
from typer.testing import CliRunner

import octavo
from octavo.engine import cli
from octavo.engine.llm import Token


def run(*arguments, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "octavo.engine.cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)


def test_generate_answers_from_the_real_model():
    options = ("--max-tokens", "24", "--kv-cache-dtype", "int8", "--enforce-eager")
    done = run("generate", "What is the capital of France?", "--device", "cpu", *options)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "tokens/s" not in done.stdout
    assert "tokens/s" in done.stderr.splitlines()[-1]


def test_a_terminal_is_told_what_loading_took(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=out, force_terminal=True, highlight=False, width=200))
    llm = cli._load("smollm2", "cpu", cli.DType.auto, allow_pickle=False)
    text = Text.from_ansi(out.getvalue()).plain
    assert "loading smollm2" in text and "B/s" in text, "the bar"
    assert re.search(
        r"loaded 0\.\d\d GB in \d+\.\d\d s \(\d+\.\d\d GB/s\), with at most \d+\.\d\d GB of the host", text
    )
    assert llm.load_report.num_bytes < llm.load_report.host_peak and llm.load_report.device_peak is None


def test_pickles_only_where_they_are_asked_for(tmp_path):
    from tiny_models import save_tiny_llama

    save_tiny_llama(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    command = ["generate", "w5 w6", "--model", str(tmp_path), "--device", "cpu", "--max-tokens", "3"]
    refused = run(*command)
    assert refused.returncode == 2 and "--allow-pickle" in refused.stderr and not refused.stdout
    done = run(*command, "--allow-pickle")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(w\d+ ?){3}", done.stdout.strip())


def test_chat_answers_each_line_and_ends_with_its_input():
    lines = "What is the capital of France?\nWhat is the capital of Germany?\n"
    done = run("chat", "--device", "cpu", "--max-tokens", "24", input=lines)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout and "Berlin" in done.stdout
    assert done.stderr.count("tokens/s") == 2


def test_chat_sends_the_whole_conversation(monkeypatch):
    seen = []

    class Echo:
        def stream(self, messages, params):
            seen.append([dict(m) for m in messages])
            return [Token(0, 7, f"answer {len(seen)}", "stop")]

    monkeypatch.setattr(cli, "_load", lambda *args, **options: Echo())
    done = CliRunner().invoke(cli.app, ["chat", "--system", "Be brief."], input="one\ntwo\nexit\nthree\n")
    assert done.exit_code == 0
    system = {"role": "system", "content": "Be brief."}
    first = {"role": "user", "content": "one"}
    assert seen[0] == [system, first]
    assert seen[1] == [system, first, {"role": "assistant", "content": "answer 1"}, {"role": "user", "content": "two"}]
    assert len(seen) == 2


def test_env_lists_every_op():
    done = run("env")
    assert done.returncode == 0, done.stderr
    assert "torch" in done.stdout and "triton" in done.stdout
    for op in octavo.backends("cpu"):
        assert op in done.stdout


@pytest.fixture
def unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "vocab_size": 5}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", ""], "prompt: empty"),
        (["generate", "hi", "--model", "/no/such/model"], "/no/such/model"),
        (["generate", "hi", "--temperature", "-1"], "temperature: -1.0"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens: 0"),
        (["generate", "hi", "--device", "tpu9"], "device: 'tpu9'"),
        (["generate", "hi", "--kv-cache-dtype", "fp4"], "kv_cache_dtype: 'fp4'"),
        (["generate", "word " * 9000, "--device", "cpu"], "the context holds 8192"),
    ],
)
def test_mistakes_are_one_readable_line(arguments, message, monkeypatch, capfd):
    """In this process: each of its own would take seconds to import what it needs. Those below have one."""
    monkeypatch.setattr(sys, "argv", ["octavo", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    seen = capfd.readouterr()
    assert stopped.value.code == 2
    assert message in seen.err and "Traceback" not in seen.err
    assert len(seen.err.strip().splitlines()) == 1
    assert seen.out == ""


def test_unknown_architecture_is_named(unknown_architecture):
    done = run("generate", "hi", "--model", unknown_architecture)
    assert done.returncode == 2 and "BertModel" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_cut_off_gguf_is_named(tmp_path):
    from octavo.engine.hub import resolve

    cut = tmp_path / "cut.gguf"
    with open(resolve("smollm2"), "rb") as whole:
        cut.write_bytes(whole.read(5_000_000))
    done = run("generate", "hi", "--model", str(cut))
    assert done.returncode == 2 and "cut.gguf" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_unknown_option_is_clicks_own_error():
    assert run("generate", "hi", "--no-such-option").returncode == 2
