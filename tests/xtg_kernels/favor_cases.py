"""Cases of favor_attention, and the formula of it in plain PyTorch, that the op tests share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.xtg_kernels.ragged_cases import cu_seqlens_of, relative_error
from xtg_kernels import favor_attention


@dataclass
class Case:
    """Arguments of favor_attention, the gradient of its output, and ways to run it."""

    lengths: Sequence[tuple[int, int]]  # keys and queries of each cell
    q: Tensor
    k: Tensor
    v: Tensor
    projection: Tensor
    grad_out: Tensor
    eps: float
    stabilizer: str

    @staticmethod
    def random(
        lengths: Sequence[tuple[int, int]],
        heads: int,
        head_dim: int,
        features: int,
        dtype: torch.dtype,
        slack: int = 0,
        *,
        eps: float = 1e-4,
        stabilizer: str = "head",
        device: str = "cpu",
    ) -> Case:
        """Gaussian numbers; the slack rows of q, k, v and grad_out hold NaN, which nothing may read."""
        total_nnz, total_q = (sum(pair[i] for pair in lengths) for i in range(2))
        generator = torch.Generator().manual_seed(total_nnz * 131 + head_dim)

        def rows(total: int) -> Tensor:
            x = torch.randn((total + slack, heads, head_dim), generator=generator).to(dtype)
            x[total:] = math.nan
            return x.to(device)

        q, k, v = (rows(total).requires_grad_() for total in (total_q, total_nnz, total_nnz))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        projection = torch.randn((features, head_dim), generator=generator, dtype=wide).to(device)
        return Case(lengths, q, k, v, projection, rows(total_q), eps, stabilizer)

    @property
    def cu_seqlens(self) -> Tensor:
        return cu_seqlens_of([keys for keys, _ in self.lengths]).to(self.q.device)

    @property
    def cu_seqlens_q(self) -> Tensor:
        return cu_seqlens_of([queries for _, queries in self.lengths]).to(self.q.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """favor_attention of these rows."""
        longest, longest_q = (max((pair[i] for pair in self.lengths), default=0) for i in range(2))
        return favor_attention(
            q, k, v, self.projection, self.cu_seqlens, longest,
            cu_seqlens_q=self.cu_seqlens_q, max_seqlen_q=longest_q, eps=self.eps, stabilizer=self.stabilizer,
        )  # fmt: skip

    def run(self) -> tuple[Tensor, ...]:
        """out and the gradients to q, k and v."""
        out = self.attend(self.q, self.k, self.v)
        return out.detach(), *torch.autograd.grad(out, (self.q, self.k, self.v), self.grad_out)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same by the formula in plain PyTorch, in another dtype."""
        inputs = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out = plain_favor(self, *inputs)
        if not out.requires_grad:  # no cell has keys and queries
            return out, *(torch.zeros_like(x) for x in inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, self.grad_out.to(dtype))

    def exact(self) -> tuple[Tensor, ...]:
        """The same in float64."""
        return self.plain(torch.float64)

    def unused(self) -> list[Tensor]:
        """For out and the three gradients: the rows that belong to no cell with keys and queries."""
        both = torch.tensor([keys > 0 and queries > 0 for keys, queries in self.lengths], dtype=torch.bool)
        found = []
        for i, x in ((1, self.q), (1, self.q), (0, self.k), (0, self.v)):
            lengths = torch.tensor([pair[i] for pair in self.lengths], dtype=torch.long)
            rows = ~both.repeat_interleave(lengths)
            found.append(torch.cat([rows, rows.new_ones(len(x) - len(rows))]).to(x.device))
        return found

    def cell(self, c: int) -> tuple[Case, tuple[slice, slice]]:
        """One cell alone, and its rows in q and in k."""
        (start, start_q), (end, end_q) = (
            tuple(sum(pair[i] for pair in self.lengths[:n]) for i in range(2)) for n in (c, c + 1)
        )
        keys, queries = slice(start, end), slice(start_q, end_q)
        q, k, v = (x.detach()[rows].requires_grad_() for x, rows in ((self.q, queries), (self.k, keys), (self.v, keys)))
        alone = replace(self, lengths=[self.lengths[c]], q=q, k=k, v=v, grad_out=self.grad_out[queries])
        return alone, (queries, keys)


def plain_favor(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula cell by cell in the dtype of q, all features in memory: what a user would write."""
    out = q.new_zeros(q.shape)
    scale, projection = q.shape[2] ** -0.25, case.projection.to(q.dtype)
    bounds = (itertools.pairwise(x.tolist()) for x in (case.cu_seqlens, case.cu_seqlens_q))
    for (start, end), (start_q, end_q) in zip(*bounds, strict=True):
        if start == end or start_q == end_q:
            continue
        q_s, k_s = (scale * x.transpose(0, 1) for x in (q[start_q:end_q], k[start:end]))
        q_scores, k_scores = q_s @ projection.T, k_s @ projection.T
        q_norms, k_norms = (x.square().sum(-1, keepdim=True) / 2 for x in (q_s, k_s))
        key_max = k_scores.amax((0, 1, 2) if case.stabilizer == "cell" else (1, 2), keepdim=True)
        row_max = q_scores.amax(-1, keepdim=True)
        query_features = (q_scores - q_norms - row_max).exp() + case.eps
        key_features = (k_scores - k_norms - key_max).exp() + case.eps
        context = key_features.mT @ v[start:end].transpose(0, 1)
        denominator = query_features @ key_features.sum(1)[..., None]
        out[start_q:end_q] = (query_features @ context / denominator).transpose(0, 1)
    return out


def relative_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Of out and the gradients to q, k and v."""
    return [relative_error(a, b) for a, b in zip(got, want, strict=True)]


def overall_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[float, float]:
    """Of out and of all gradients as one: a cell with one key has no gradient to q and k."""
    gradients = (torch.cat([x.flatten() for x in grads[1:]]) for grads in (got, want))
    return relative_error(got[0], want[0]), relative_error(*gradients)


def error_limits(case: Case) -> list[float]:
    """Twice (gradients: three times) the error of the formula in the dtype of the case; in float32 at least 2e-6."""
    floor = 2e-6 if case.q.dtype == torch.float32 else 0.0
    errors = relative_errors(case.plain(case.q.dtype), case.exact())
    return [max(factor * error, floor) for factor, error in zip((2, 3, 3, 3), errors, strict=True)]
