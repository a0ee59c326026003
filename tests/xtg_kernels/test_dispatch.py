"""Backends, the info report, schemas in their two homes, a build without C++ and a build that does not load."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import xtg_kernels
from tests import warm
from tests.xtg_kernels.ragged_cases import ISAS, needs_cpp
from xtg_kernels import RaggedBatch, current_backend, dispatch, info, use_backend
from xtg_kernels.ops.dropout import library as dropout
from xtg_kernels.ops.expression_embedding import library as embedding
from xtg_kernels.ops.favor_attention import library as favor
from xtg_kernels.ops.masked_decoder_gather import library as gather
from xtg_kernels.ops.masked_head import library as head
from xtg_kernels.ops.ragged_attention import library as attention

PACKAGE = Path(xtg_kernels.__file__).parent
SCHEMAS = {
    "ragged_attention": attention.SCHEMA,
    "ragged_attention_backward": attention.BACKWARD_SCHEMA,
    "expression_embedding": embedding.SCHEMA,
    "expression_embedding_backward": embedding.BACKWARD_SCHEMA,
    "distinct_index": embedding.DISTINCT_SCHEMA,
    "dropout": dropout.SCHEMA,
    "dropout_backward": dropout.BACKWARD_SCHEMA,
    "favor_attention": favor.SCHEMA,
    "favor_attention_backward": favor.BACKWARD_SCHEMA,
    "masked_decoder_gather": gather.SCHEMA,
    "masked_decoder_gather_backward": gather.BACKWARD_SCHEMA,
    "masked_head": head.SCHEMA,
    "masked_head_backward": head.BACKWARD_SCHEMA,
    "masked_mse": head.MSE_SCHEMA,
    "masked_mse_backward": head.MSE_BACKWARD_SCHEMA,
}


def python(code: str, *, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in an interpreter that has imported torch at most, a fresh one not even that; an empty string removes a
    variable."""
    env = {k: v for k, v in (os.environ | environment).items() if v != ""}
    command = [sys.executable] if fresh else warm.python()
    return subprocess.run([*command, "-c", code], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("op", SCHEMAS)
def test_schemas_agree(op: str) -> None:
    """csrc/ops.cpp and library.py say the same, and so do all overloads."""
    want = str(torch._C.parse_schema(f"xtg::{op}{SCHEMAS[op]}"))
    for overload in dispatch.OVERLOADS:
        got = str(getattr(getattr(torch.ops.xtg, op), overload)._schema)
        assert got.replace(f"{op}.{overload}(", f"{op}(") == want


def test_use_backend_is_restored_and_checked() -> None:
    before = current_backend()
    with use_backend("reference"):
        assert current_backend() == "reference"
        with (
            pytest.raises(ValueError, match="expected one of auto, reference, cpp, triton, varlen, got 'cuda'"),
            use_backend("cuda"),
        ):
            pass
        assert current_backend() == "reference"
    assert current_backend() == before


def test_environment_variable_sets_the_backend() -> None:
    code = "import xtg_kernels; print(xtg_kernels.current_backend())"
    assert python(code, XTG_BACKEND="reference").stdout.strip() == "reference"
    refused = python(code, XTG_BACKEND="gpu")
    assert refused.returncode != 0
    assert "XTG_BACKEND: expected one of" in refused.stderr


def test_the_backward_runs_where_the_forward_ran() -> None:
    q = torch.randn((4, 1, 16), requires_grad=True)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with use_backend("reference"):
        out = xtg_kernels.ragged_attention(q, q, q, cu_seqlens, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("ragged_attention_backward" in name for name in names)
    assert "aten::softmax" not in names
    assert "aten::exp" in names, "the reference's own operations"


@needs_cpp
def test_environment_variable_sets_the_isa() -> None:
    code = "import torch, xtg_kernels; from xtg_kernels import _C; print(_C.active_isa())"
    for isa in ISAS:
        assert python(code, XTG_CPU_ISA=isa).stdout.strip() == isa
    assert python(code, XTG_CPU_ISA="").stdout.strip() == ISAS[-1]
    refused = python(code, XTG_CPU_ISA="avx9000")
    assert "XTG_CPU_ISA: expected one of the ISAs of this machine" in refused.stderr


def test_import_needs_no_triton() -> None:
    """PyTorch itself imports Triton where it finds it, so the import is made to fail instead of being looked for."""
    code = "import sys; sys.modules['triton'] = None; import xtg_kernels, xtg_kernels.info; xtg_kernels.info.main()"
    done = python(code, fresh=True, TRITON_INTERPRET="")
    assert done.returncode == 0, done.stderr
    assert "not triton: " in done.stdout


def test_triton_declines_cpu_tensors_without_the_interpreter() -> None:
    code = """
import torch, xtg_kernels
q, cu = torch.zeros(4, 1, 16), torch.tensor([0, 4], dtype=torch.int32)
with xtg_kernels.use_backend("triton"):
    xtg_kernels.ragged_attention(q, q, q, cu, 4)
"""
    refused = python(code, TRITON_INTERPRET="")
    assert "ragged_attention: backend 'triton' declines: Triton kernels take GPU tensors" in refused.stderr


def test_info_names_every_op_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    found = info.info()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    built = dispatch.extension() is not None
    for choice in found["ops"]["cpu"].values():
        assert choice["backend"] == ("cpp" if built else "reference")
        assert ("cpp" in choice["declined"]) != built
    info.main()
    printed = capsys.readouterr().out
    for word in ("torch", "isa", "threads", "gpus", "ragged_attention bfloat16", "expression_embedding float32"):
        assert word in printed


@pytest.fixture
def copied_package(tmp_path: Path) -> Path:
    """xtg_kernels without its extension, as XTG_BUILD_CPP=0 installs it."""
    target = tmp_path / "xtg_kernels"
    for source in PACKAGE.rglob("*.py"):
        copy = target / source.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return target


PATH = """
import sys
sys.path.insert(0, {folder!r})
"""
USE = (
    PATH
    + """
import torch, xtg_kernels
assert xtg_kernels.__file__.startswith({folder!r})
q = torch.randn(4, 1, 16, requires_grad=True)
cu = torch.tensor([0, 4], dtype=torch.int32)
xtg_kernels.ragged_attention(q, q, q, cu, 4).sum().backward()
w = [torch.randn(s) for s in ((5,), (5,), (5, 5), (5,), (5, 3))]
assert xtg_kernels.expression_embedding(torch.rand(4), *w, cu_seqlens=cu).shape == (4, 3)
rows, genes = torch.randn(4, 3), torch.arange(4)
assert xtg_kernels.dropout(rows, 0.5, genes, genes[0]).shape == (4, 3)
assert xtg_kernels.masked_decoder_gather(rows, rows[0], rows[1], rows, cu, genes, None, None).shape == (1, 4, 3)
params = [torch.ones(n) for n in (3, 3, 3, 3, 3, 1)]
assert xtg_kernels.masked_head(rows, None, *params).shape == (4,)
assert xtg_kernels.masked_mse(rows, genes[:2], torch.zeros(2), *params).shape == ()
from xtg_kernels import info
print(info.info()["extension"]); info.main()
"""
)


def test_without_the_extension_everything_runs_on_the_reference(copied_package: Path) -> None:
    done = python(USE.format(folder=str(copied_package.parent)))
    assert done.returncode == 0, done.stderr
    assert "not built (installed with XTG_BUILD_CPP=0): CPU tensors take the reference" in done.stdout
    assert "ragged_attention float32: reference" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_a_source_tree_without_the_extension_says_so(copied_package: Path, tmp_path: Path, installed: bool) -> None:
    """A clone that hides the installed package: one line at import names what is hidden, and so does info."""
    (tmp_path / "setup.py").touch()
    (tmp_path / "csrc").mkdir()
    hidden = tmp_path / "site" / "xtg_kernels"
    hidden.mkdir(parents=True)
    if installed:
        (hidden / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    used = USE.format(folder=str(tmp_path)).replace(
        "import sys\n", f"import sys\nsys.path.insert(0, {str(hidden.parent)!r})\n"
    )
    done = python(used)
    assert done.returncode == 0, done.stderr
    reason = f"not built for this Python in the source tree {tmp_path} that xtg_kernels comes from (make setup there"
    warned = [line for line in done.stderr.splitlines() if "UserWarning" in line]
    assert len(warned) == 1
    for said in (warned[0], done.stdout.splitlines()[0]):
        assert reason in said
        assert (str(hidden) in said) == installed
    assert f"not cpp: the C++ extension was {reason}" in done.stdout
    assert "Warning" not in python(used, XTG_BACKEND="reference").stderr


HIDE = """
import sys
finders = sys.meta_path[:]
class Hider:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {hidden!r}:
            return next((spec for f in finders if (spec := f.find_spec(name, path, target)) is not None), None)
sys.meta_path[:] = [Hider]
"""
NOT_NEEDED = ("anndata", "h5py", "tqdm", "huggingface_hub", "scipy", "pandas", "yaml", "safetensors", "xtrimogene")


@pytest.mark.parametrize("hidden", [NOT_NEEDED, (*NOT_NEEDED, "triton")], ids=["torch, numpy and triton", "no triton"])
def test_the_ops_need_no_package_of_cells(hidden: tuple[str, ...]) -> None:
    """With torch, numpy and Triton alone, and on a CPU without Triton, every op runs."""
    used = USE.replace("assert xtg_kernels.__file__.startswith({folder!r})\n", "").format(folder=str(PACKAGE.parent))
    done = python(HIDE.format(hidden=hidden) + used, fresh=True, TRITON_INTERPRET="")
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    """Neither the compiler of torch nor a kernel of Triton is loaded before it is asked for."""
    late = ("torch._dynamo", "torch._inductor", "torch.nn.attention.varlen")
    code = f"""
import sys, torch
before = set(sys.modules)
import xtg_kernels
new = set(sys.modules) - before
print([name for name in new if name.startswith({late!r}) or name.endswith("triton_kernel")])
"""
    assert python(code).stdout.strip() == "[]"


def test_an_extension_that_does_not_load_says_why_at_first_use(copied_package: Path) -> None:
    (copied_package / "_C.cpython-311-x86_64-linux-gnu.so").write_bytes(b"not a library")
    (copied_package / "_C.abi3.so").write_bytes(b"not a library")
    folder = str(copied_package.parent)
    imported = python(PATH.format(folder=folder) + "import xtg_kernels; print('imported')")
    assert imported.stdout.strip() == "imported"
    used = python(USE.format(folder=folder))
    assert "ImportError" in used.stderr
    assert "file too short" in used.stderr or "invalid ELF header" in used.stderr, "the loader's own words"
    by_choice = python(USE.format(folder=folder).split("from xtg_kernels import info")[0], XTG_BACKEND="reference")
    assert by_choice.returncode == 0, by_choice.stderr


def test_ragged_batch_checks_its_shapes_and_moves() -> None:
    values, ids = torch.rand(5), torch.arange(5, dtype=torch.int32)
    batch = RaggedBatch(values, ids, torch.tensor([0, 2, 5], dtype=torch.int32), 3)
    assert (batch.batch_size, batch.total_nnz, batch.lengths.tolist()) == (2, 5, [2, 3])
    moved = batch.to("meta")
    assert {x.device.type for x in (moved.values, moved.gene_ids, moved.cu_seqlens)} == {"meta"}
    with pytest.raises(ValueError, match=r"gene_ids: expected the shape of values \(5,\), got \(4,\)"):
        RaggedBatch(values, ids[:4], batch.cu_seqlens, 3)
    with pytest.raises(ValueError, match="values: expected shape"):
        RaggedBatch(values[None], ids, batch.cu_seqlens, 3)
    with pytest.raises(ValueError, match="cu_seqlens: expected shape"):
        RaggedBatch(values, ids, batch.cu_seqlens[:0], 3)
