"""Whatever somebody plants in a file that is read, no code of theirs runs: checkpoints, runs, plans, models, data."""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import geminifx
import pytest
import torch
from geminifx.compiler.cli.job import TrainOptions, prepare
from geminifx.compiler.cli.run_directory import STATE, RunDirectory
from geminifx.models.presets import load_model
from geminifx.models.recipe.records import read_records
from geminifx.models.recipe.text import train_tokenizer
from geminifx.runtime.state_io.checksums import CHECKSUMS, seal
from saving import OPTIMIZERS, compiled, train
from torch.distributed.checkpoint.metadata import MetadataIndex
from trainable import SMALL_OPT

CODE = "import os\nos.mkdir({!r})\nclass Planted: ...\n"
TOLD = (geminifx.GeminiError, ValueError, OSError)
"""What a user may see of it. Nothing at all is well, too: a text is a text."""


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.folder),)


def as_pickle(folder: Path) -> bytes:
    return pickle.dumps(Evil(folder))


def as_torch_saves(folder: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": Evil(folder)}, stream)
    return stream.getvalue()


def as_torch_saved(folder: Path) -> bytes:
    """As before it wrote zip files."""
    stream = io.BytesIO()
    torch.save(Evil(folder), stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def as_json(folder: Path) -> bytes:
    """Hugging Face's way to bring code with a model."""
    names = {"AutoConfig": "planted.Planted", "AutoModelForCausalLM": "planted.Planted"}
    auto = {"auto_map": {**names, "AutoTokenizer": ["planted.Planted", "planted.Planted"]}}
    return json.dumps({**auto, "model_type": "planted", "tokenizer_class": "Planted"}).encode()


PAYLOADS = [as_pickle, as_torch_saves, as_torch_saved, as_json]


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """The folder that payloads make."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code has run"


def plant(file: Path, payload: bytes, ran: Path, sealed: Path | None = None) -> None:
    """Put a payload in the place of a file, with code beside it, and, as its author would, new checksums."""
    file.unlink()
    file.write_bytes(payload)
    (file.parent / "planted.py").write_text(CODE.format(str(ran)))
    if sealed is not None:
        for folder in dict.fromkeys((file.parent, sealed)):
            (folder / CHECKSUMS).unlink(missing_ok=True)
            seal(folder)


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_the_payloads_are_ones(tmp_path: Path) -> None:
    """Else nothing here could fail."""
    for number, payload in enumerate(PAYLOADS[:3]):
        folder = tmp_path / str(number)
        with suppress(RuntimeError):  # a pickle is no file of torch's: it was run all the same
            torch.load(io.BytesIO(payload(folder)), weights_only=False)
        assert folder.exists()
    exec(CODE.format(str(tmp_path / "code")))
    assert (tmp_path / "code").exists() and zipfile.is_zipfile(io.BytesIO(as_torch_saves(tmp_path / "zip")))


# -- checkpoints -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> geminifx.CompiledModule:
    return compiled()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = compiled()
    optimizer = OPTIMIZERS["own"](model)
    train(model, optimizer)
    folder = tmp_path_factory.mktemp("checkpoint") / "saved"
    geminifx.save_checkpoint(model, optimizer, folder, extra={"step": 3})
    return folder


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", CHECKSUMS])
def test_a_file_of_a_checkpoint(
    tmp_path: Path, ran: Path, checkpoint: Path, model: geminifx.CompiledModule,
    name: str, payload: Callable[[Path], bytes], sealed: bool,
) -> None:  # fmt: skip
    assert {".metadata", "__0_0.distcp", CHECKSUMS} == set(files(checkpoint))
    folder = shutil.copytree(checkpoint, tmp_path / "saved")
    plant(folder / name, payload(ran), ran, folder if sealed and name != CHECKSUMS else None)
    with pytest.raises(geminifx.CheckpointError):
        geminifx.load_checkpoint(model, None, folder)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["extra", "optimizer", "model.0.weight"])
def test_a_value_of_a_checkpoint(
    tmp_path: Path, ran: Path, checkpoint: Path, model: geminifx.CompiledModule,
    name: str, payload: Callable[[Path], bytes],
) -> None:  # fmt: skip
    folder = shutil.copytree(checkpoint, tmp_path / "saved")
    metadata, data = pickle.loads((folder / ".metadata").read_bytes()), payload(ran)
    for index in (MetadataIndex(name), MetadataIndex(name, torch.Size((0, 0)))):
        if index in metadata.storage_data:
            metadata.storage_data[index].offset = (folder / "__0_0.distcp").stat().st_size
            metadata.storage_data[index].length = len(data)
    plant(folder / "__0_0.distcp", (folder / "__0_0.distcp").read_bytes() + data, ran)
    plant(folder / ".metadata", pickle.dumps(metadata), ran, folder)
    with pytest.raises(geminifx.CheckpointError, match=r"damaged|could not load"):
        geminifx.load_checkpoint(model, None, folder)
    model.session.half_loaded.clear()


# -- runs and models ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory, beside its data and its config file."""
    folder = tmp_path_factory.mktemp("run")
    text = "the quick brown fox jumps over the lazy dog. " * 40
    (folder / "data.txt").write_text(text)
    (folder / "data.jsonl").write_text(json.dumps({"text": text}))
    (folder / "small.json").write_text(json.dumps(SMALL_OPT))
    source = load_model(str(folder / "small.json"))
    ids = torch.zeros(2, 16, dtype=torch.int64)
    model = geminifx.compile(source, example_inputs={"input_ids": ids, "labels": ids})
    tokenizer = train_tokenizer([text], 300)
    RunDirectory(model, tokenizer).save(folder / "run", model.optimizer(torch.optim.AdamW, lr=1e-3), {"step": 0})
    return folder


RUN_FILES = (
    CHECKSUMS,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    f"{STATE}/.metadata",
    f"{STATE}/__0_0.distcp",
    f"{STATE}/{CHECKSUMS}",
)
ALSO_READ = (
    "pytorch_model.bin",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "adapter_config.json",
    "processor_config.json",
    "pytorch_model.bin.index.json",
)
"""Names that libraries look for."""


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", (*RUN_FILES, *ALSO_READ))
def test_a_file_of_a_run(
    tmp_path: Path, ran: Path, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, payload: Callable[[Path], bytes]
) -> None:
    def asks(*_: object) -> str:
        raise AssertionError("nobody is asked whether to run code")

    monkeypatch.setattr("builtins.input", asks)
    assert set(RUN_FILES) == set(files(run / "run"))
    folder = shutil.copytree(run / "run", tmp_path / "run")
    if name.startswith("pytorch_model"):
        (folder / "model.safetensors").unlink()
    (folder / name).touch()
    plant(folder / name, payload(ran), ran, None if name.endswith(CHECKSUMS) else folder)
    options = TrainOptions(data=run / "data.txt", seq_len=16, output=folder, resume=True)
    if name.startswith(STATE):
        with pytest.raises(geminifx.CheckpointError):
            RunDirectory(compiled(), None).open(folder)  # type: ignore[arg-type]
    elif name in (CHECKSUMS, "model.safetensors", "tokenizer.json", "pytorch_model.bin"):
        with pytest.raises(geminifx.CheckpointError, match="start the run without --resume"):
            prepare(options)
    else:
        with suppress(*TOLD):
            prepare(options)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_config_file(tmp_path: Path, ran: Path, run: Path, payload: Callable[[Path], bytes]) -> None:
    shutil.copy(run / "small.json", tmp_path / "small.json")
    plant(tmp_path / "small.json", payload(ran), ran)
    with pytest.raises(geminifx.GeminiError):
        load_model(str(tmp_path / "small.json"))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", ["data.txt", "data.jsonl"])
def test_data(tmp_path: Path, ran: Path, run: Path, name: str, payload: Callable[[Path], bytes]) -> None:
    shutil.copy(run / name, tmp_path / name)
    plant(tmp_path / name, payload(ran), ran)
    with suppress(ValueError):
        read_records(tmp_path / name)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_plan(tmp_path: Path, ran: Path, model: geminifx.CompiledModule, payload: Callable[[Path], bytes]) -> None:
    model.plan.save(tmp_path / "plan.json")
    plant(tmp_path / "plan.json", payload(ran), ran)
    with pytest.raises(ValueError):
        geminifx.compile(torch.nn.Linear(6, 3), example_inputs=(torch.ones(8, 6),), plan=tmp_path / "plan.json")
