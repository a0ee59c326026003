"""The attention forward with tensor descriptors, compiled for comparison only, computes what the op does."""

from __future__ import annotations

import pytest
import torch

from benchmarks.static import tensor_descriptors
from xtg_kernels.ops.ragged_attention import reference
from xtrimogene.bench.tasks import offsets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("head_dim", [16, 64])
def test_it_is_the_forward_of_the_op(head_dim: int) -> None:
    """Partial key blocks, an empty cell, and rows of the next cell, which are NaN and must not get into a result."""
    lengths = (70, 0, 3, 33)
    q, k, v = torch.randn((sum(lengths) + 5, 3, 2, head_dim), device=DEVICE).unbind(1)
    q[-5:], k[-5:], v[-5:] = (float("nan"),) * 3
    cu_seqlens = offsets(lengths).to(DEVICE)
    config = {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    out, softmax_lse = tensor_descriptors.forward(q, k, v, cu_seqlens, config)
    expected = reference.forward(q.double(), k.double(), v.double(), cu_seqlens, 70, head_dim**-0.5)
    n = sum(lengths)
    torch.testing.assert_close(out[:n].double(), expected[0][:n], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(softmax_lse[:, :n].double(), expected[1][:, :n], rtol=1e-5, atol=1e-5)
