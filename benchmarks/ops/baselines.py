"""What a skilled user of plain PyTorch would write for each op, and the same work in float64 as the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xtrimogene.bench.plain import padded, used_slots

_QUERY_ROWS = 1024  # rows of scores at a time in float64
FAVOR_EPS = 1e-4  # of the decoder


def attention_padded(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """(total_nnz, num_heads, head_dim): one SDPA on the batch padded to its longest cell, with a mask."""
    used = used_slots(lengths, max(lengths), q.device)
    q, k, v = (padded(x, lengths, max(lengths)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=used[:, None, None])
    return out.transpose(1, 2)[used]


def favor_features(q: Tensor, k: Tensor, projection: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """FAVOR+ features (num_heads, rows, num_features) of queries and keys of one cell, stabilised for each head."""
    scale, ratio = q.shape[-1] ** -0.25, len(projection) ** -0.5
    found = []
    for x, dims in ((q, (-1,)), (k, (-2, -1))):
        x = scale * x.transpose(0, 1)
        scores = torch.einsum("hnd,md->hnm", x, projection)
        half_norms = x.square().sum(-1, keepdim=True) / 2
        found.append(ratio * ((scores - half_norms - scores.amax(dims, keepdim=True)).exp() + eps))
    return found[0], found[1]


def favor_einsum(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, lengths: Sequence[int], lengths_q: Sequence[int], eps: float
) -> Tensor:
    """(total_q, num_heads, head_dim): FAVOR+ attention of each cell by einsum, as public Performers compute it."""
    outputs = []
    for q_s, k_s, v_s in zip(q.split(list(lengths_q)), k.split(list(lengths)), v.split(list(lengths)), strict=True):
        query_features, key_features = favor_features(q_s, k_s, projection, eps)
        context = torch.einsum("hnm,nhd->hmd", key_features, v_s)
        inverse = 1 / torch.einsum("hnm,hm->hn", query_features, key_features.sum(1))
        outputs.append((torch.einsum("hnm,hmd->hnd", query_features, context) * inverse[..., None]).transpose(0, 1))
    return torch.cat(outputs)


def embedding_unfused(
    values: Tensor,
    gene_ids: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    bin_table: Tensor,
    gene_table: Tensor,
) -> Tensor:
    """(total_nnz, dim): the formula of the value embedding, one PyTorch call a step, with (total_nnz, bins) tensors."""
    hidden = F.leaky_relu(values.to(w1.dtype)[:, None] * w1 + b1, 0.1)
    bin_weights = (hidden + F.linear(hidden, w2, b2)).softmax(-1)
    return bin_weights @ bin_table + F.embedding(gene_ids, gene_table)


def gather_indexed(
    table: Tensor,
    zero_row: Tensor,
    mask_row: Tensor,
    encoded: Tensor,
    cu_seqlens: Tensor,
    gene_ids: Tensor,
    masked_ids: Tensor,
    masked_cu_seqlens: Tensor,
) -> Tensor:
    """(batch, num_genes, dim): every gene looks up its row among the tokens, the zero row and the mask row.

    Faster, forward and backward, than writing tokens and masks into a tensor of zero rows with index_put.
    """
    batch, total = cu_seqlens.numel() - 1, len(gene_ids)
    cells = torch.arange(batch)
    source = torch.full((batch, len(table)), total)
    source[cells.repeat_interleave(cu_seqlens.diff()), gene_ids.long()] = torch.arange(total)
    source[cells.repeat_interleave(masked_cu_seqlens.diff()), masked_ids.long()] = total + 1
    return F.embedding(source, torch.cat([encoded, zero_row[None], mask_row[None]])) + table


def head_indexed(
    rows: Tensor,
    x: Tensor,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """(n,): the chosen rows, both norms and the linear map, one PyTorch call a step."""
    shape = x.shape[1:]
    normed = F.layer_norm(F.layer_norm(x[rows], shape, norm1_weight, norm1_bias), shape, norm2_weight, norm2_bias)
    return F.linear(normed, weight[None], bias)[:, 0]


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """Attention and its gradients to q, k, v in float64, some rows of scores at a time: long cells fit in memory."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    grads = [torch.zeros_like(out) for _ in range(3)]
    scale = q.shape[2] ** -0.5
    start = 0
    for length in lengths:
        cell = slice(start, start + length)
        start += length
        for head in range(q.shape[1]):
            k_s, v_s = (x[cell, head].detach().double() for x in (k, v))
            for first in range(cell.start, cell.stop, _QUERY_ROWS):
                rows = slice(first, min(first + _QUERY_ROWS, cell.stop))
                q_s, grad_s = (x[rows, head].detach().double() for x in (q, grad_out))
                probs = (scale * q_s @ k_s.T).softmax(-1)
                out[rows, head] = probs @ v_s
                grad_probs = grad_s @ v_s.T
                delta = (grad_s * out[rows, head]).sum(-1, keepdim=True)
                grad_scores = scale * probs * (grad_probs - delta)
                grads[0][rows, head] = grad_scores @ k_s
                grads[1][cell, head] += grad_scores.T @ q_s
                grads[2][cell, head] += probs.T @ grad_s
    return out, grads


def exact_favor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    grad_out: Tensor,
    lengths: Sequence[int],
    lengths_q: Sequence[int],
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """FAVOR+ attention and its gradients to q, k, v in float64, a head at a time: features of all take gigabytes."""
    out, grads = (
        torch.empty(q.shape, dtype=torch.float64, device=q.device),
        [torch.empty(x.shape, dtype=torch.float64, device=q.device) for x in (q, k, v)],
    )
    for head in range(q.shape[1]):
        one = slice(head, head + 1)
        inputs = [x[:, one].detach().double().requires_grad_() for x in (q, k, v)]
        head_out = favor_einsum(inputs[0], inputs[1], inputs[2], projection.double(), lengths, lengths_q, eps)
        out[:, one] = head_out.detach()
        for grad, found in zip(grads, torch.autograd.grad(head_out, inputs, grad_out[:, one].double()), strict=True):
            grad[:, one] = found
    return out, grads
