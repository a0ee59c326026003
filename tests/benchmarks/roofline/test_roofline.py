"""The roofline on paper: floors by hand and by what the ops take and give, and never above the model's time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import xtg_kernels  # noqa: F401  (registers the ops)
from benchmarks.roofline import __main__ as page
from benchmarks.roofline import floors, profiles
from benchmarks.roofline.floors import Batch, Need
from benchmarks.static.cards import CARDS, Card
from benchmarks.static.configs import OPS_FOLDER, TABLE
from benchmarks.static.launches import OPS
from benchmarks.static.model import Shape
from xtrimogene.bench.rows import Rows, read_rows
from xtrimogene.bench.tasks import real_lengths, umi_counts
from xtrimogene.network.config import XTrimoGeneConfig

H100 = CARDS["sm_90"]
# Two cells of a small network, where nothing is a multiple of anything else.
SMALL = XTrimoGeneConfig(
    num_genes=50, dim=24, num_layers=3, num_heads=2, decoder_dim=20, decoder_layers=2, decoder_heads=2, num_bins=7,
    depth_tokens=True,
)  # fmt: skip
BATCH = Batch((5, 9), (3, 4), 52 + 1, (4, 8), (2, 3), (52, 52))


def _made_up(resident: int) -> Rows:
    """Rows as the table of compiled kernels has them, for the configs that are shipped."""
    widths = {"ragged_attention": 64, "expression_embedding": 128, "favor_attention": 64, "masked_decoder_gather": 256,
              "masked_head": 512, "dropout": 128}  # fmt: skip
    rows = []
    for op, spec in OPS.items():
        tree = json.loads((OPS_FOLDER / op / "configs.json").read_text())
        for architecture in page.ARCHITECTURES:
            for kernel in spec.kernels:
                kinds = tree[architecture][kernel]
                config = kinds["float32" if kernel == "sum_parts" else "half"][str(widths[op])]
                row = {
                    "op": op, "kernel": kernel, "architecture": architecture, "dtype": "bfloat16",
                    "width": widths[op], "flags": "", "config": " ".join(f"{k}={v}" for k, v in config.items()),
                    "registers": 128, "shared": 32_768, "resident_programs": resident, "wide_loads": 4, "error": "",
                }  # fmt: skip
                rows.append({name: str(value) for name, value in row.items()})
    return rows


def test_attention_of_one_cell_of_128_tokens_by_hand() -> None:
    """12 heads of 64: 4 x 768 x 128 x 128 FLOPs, an exponential a score, four tensors of 128 x 768 and softmax_lse."""
    need = floors.attention_need(floors.model_config(), (128,), "forward")
    assert need == Need(50_331_648, 12 * 16_384, 4 * 196_608 + 4 * 12 * 128 + 8)
    times = floors.bounds(need, H100)
    assert times["products"] == pytest.approx(50_331_648 / 989.4e12 * 1e6)
    assert times["exp2"] == pytest.approx(196_608 / (132 * 16 * 1.83e9) * 1e6)
    assert times["memory"] == pytest.approx(792_584 / 3.35e12 * 1e6)
    # A short cell is bound by the memory: 0.2366 microseconds.
    assert floors.floor(need, H100) == pytest.approx(0.23659, rel=1e-4)
    backward = floors.attention_need(floors.model_config(), (128,), "backward")
    assert backward == Need(10 * 768 * 16_384, 12 * 16_384, 8 * 196_608 + 4 * 12 * 128 + 8)


def test_a_peak_takes_a_microsecond() -> None:
    assert floors.bounds(Need(989_400_000, 0, 0), H100)["products"] == pytest.approx(1)
    assert floors.bounds(Need(0, 132 * 16 * 1_830, 0), H100)["exp2"] == pytest.approx(1)
    assert floors.bounds(Need(0, 0, 3_350_000), H100)["memory"] == pytest.approx(1)
    assert floors.floor(Need(989_400_000, 0, 2 * 3_350_000), H100) == pytest.approx(2)


def test_linear_layers_by_hand() -> None:
    """One token of the 100m model: 24 d d a layer; 12 d d weights, 7 d in and 9 d out, of two bytes."""
    config = floors.model_config()
    assert floors.linear_need(config, 1, "forward") == Need(12 * 24 * 768**2, 0, 2 * 12 * (12 * 768**2 + 16 * 768))
    assert floors.linear_need(config, 1, "backward") == Need(
        2 * 12 * 24 * 768**2, 0, 2 * 12 * (2 * 12 * 768**2 + 23 * 768)
    )


def test_needs_by_hand() -> None:
    """The formulas of the page, with numbers: N = 14, S = 106, P = 104, m = 23 features of heads of 10."""
    found = floors.needs(SMALL, BATCH)
    flops = {where: need.flops for where, need in found.items()}
    assert SMALL.num_features == 23
    assert flops == {
        ("ragged_attention", "forward"): 4 * 24 * 106,
        ("ragged_attention", "backward"): 10 * 24 * 106,
        ("expression_embedding", "forward"): 2 * (7 + 49 + 7 * 24) * 7,
        ("expression_embedding", "backward"): 2 * (14 + 147 + 14 * 24) * 7,
        ("favor_attention", "forward"): 8 * 20 * 23 * 104,
        ("favor_attention", "backward"): 16 * 20 * 23 * 104,
        ("masked_decoder_gather", "forward"): 0,
        ("masked_decoder_gather", "backward"): 0,
        ("masked_head", "forward"): 2 * 20 * 104,
        ("masked_head", "backward"): 6 * 20 * 104,
        ("dropout", "forward"): 0,
        ("dropout", "backward"): 0,
    }
    for direction in floors.DIRECTIONS:
        assert found["ragged_attention", direction].exp2 == 2 * 106
        assert found["expression_embedding", direction].exp2 == 7 * 7
        assert found["favor_attention", direction].exp2 == 2 * 2 * 23 * 104
    assert list(found) == [(op, direction) for op in OPS for direction in floors.DIRECTIONS]
    assert set(found) == set(floors.FORMULAS)


def _size(tensors: Sequence[object]) -> int:
    """Bytes of those that are tensors."""
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def _on_meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_bytes_are_those_of_what_the_ops_take_and_give() -> None:
    """Operands and results of the ops' own schemas, on tensors without data; every row that there is, is read."""
    ops, half, single, index = torch.ops.xtg, torch.bfloat16, torch.float32, torch.int32
    tokens, positions, encoded, masked, heads = 14, 52, 12, 5, 2
    bounds = _on_meta(index, 3)
    taken: dict[tuple[str, str], int] = {}

    q, k, v, grad_out = (_on_meta(half, tokens, heads, 12) for _ in range(4))
    out, lse = ops.ragged_attention(q, k, v, bounds, 9, 0.5)
    grads = ops.ragged_attention_backward(grad_out, None, q, k, v, out, lse, bounds, 9, 0.5)
    taken["ragged_attention", "forward"] = _size([q, k, v, bounds, out, lse])
    taken["ragged_attention", "backward"] = _size([grad_out, q, k, v, out, lse, bounds, *grads])

    weights = [_on_meta(half, *shape) for shape in ((7,), (7,), (7, 7), (7,), (7, 24))]
    values, ids, table = _on_meta(single, tokens), _on_meta(index, tokens), _on_meta(half, positions + 1, 24)
    arguments = (values, *weights, 1.0, ids, table, ids)
    rows, grad_rows = ops.expression_embedding(*arguments), _on_meta(half, tokens, 24)
    embedded = ops.expression_embedding_backward(grad_rows, *arguments, False)
    taken["expression_embedding", "forward"] = _size([*arguments, rows])
    # The gradient of the gene table does not need the table.
    taken["expression_embedding", "backward"] = _size([grad_rows, *arguments, *embedded]) - _size([table])

    q, k, v, grad_out = (_on_meta(half, 2 * positions, heads, 10) for _ in range(4))
    projection, segments = _on_meta(single, 23, 10), (bounds, positions, bounds, positions, 1e-4, False)
    kept = ops.favor_attention(q, k, v, projection, *segments)
    grads = ops.favor_attention_backward(grad_out, q, k, v, projection, *kept, *segments)
    taken["favor_attention", "forward"] = _size([q, k, v, projection, *segments, *kept])
    taken["favor_attention", "backward"] = _size([grad_out, q, k, v, projection, *kept, *segments, *grads])

    indices = (bounds, _on_meta(index, encoded), _on_meta(index, masked), bounds, None, None)
    sources = [_on_meta(half, *shape) for shape in ((positions, 20), (20,), (20,), (encoded, 20))]
    gathered = ops.masked_decoder_gather(*sources, *indices)
    grads = ops.masked_decoder_gather_backward(gathered, *indices, positions)
    taken["masked_decoder_gather", "forward"] = _size([*sources, *indices, gathered])
    taken["masked_decoder_gather", "backward"] = _size([gathered, *indices, *grads])

    x, target = _on_meta(half, 104, 20), _on_meta(single, 104)
    parameters = [*(_on_meta(single, 20) for _ in range(5)), _on_meta(single, 1)]
    loss = ops.masked_mse(x, None, target, *parameters, 1e-5, True)
    grads = ops.masked_mse_backward(loss, x, None, target, *parameters, 1e-5, True)
    taken["masked_head", "forward"] = _size([x, target, *parameters, loss])
    taken["masked_head", "backward"] = _size([loss, x, target, *parameters, *grads])

    row_ids, seed = _on_meta(torch.int64, tokens), _on_meta(torch.int64)
    x, residual = _on_meta(half, tokens, 24), _on_meta(half, tokens, 24)
    out = ops.dropout(x, residual, row_ids, seed, 0, 0.1, False)
    grad_x = ops.dropout_backward(out, None, row_ids, seed, 0, 0.1, half)
    taken["dropout", "forward"] = _size([x, residual, row_ids, seed, out])
    taken["dropout", "backward"] = _size([out, row_ids, seed, grad_x])

    assert {where: need.bytes for where, need in floors.needs(SMALL, BATCH).items()} == taken


def test_a_batch_counts_what_differs() -> None:
    batch = floors.batch_of((3000, 2000))
    counts, ids = umi_counts((3000, 2000))
    assert batch.distinct == (len(set(counts[:3000].tolist())), len(set(counts[3000:].tolist())))
    assert batch.gene_rows == len(set(ids.tolist()))
    # 30% of the genes that a cell has and 3% of the others are chosen.
    assert batch.chosen == (900 + 488, 600 + 518)


@pytest.mark.parametrize("resident", [1, 2, 8])
@pytest.mark.parametrize("architecture", page.ARCHITECTURES)
@pytest.mark.parametrize("cells", [1, 3])
def test_no_floor_is_above_the_model(resident: int, architecture: str, cells: int) -> None:
    config, rows, card = floors.model_config(), _made_up(resident), CARDS[architecture]
    batch = floors.batch_of(real_lengths(cells))
    modelled = 0
    for (op, direction), need in floors.needs(config, batch).items():
        shape = profiles.shape_of(config, op, batch.lengths, card)
        profile = profiles.op_profile(rows, config, op, direction, architecture, shape)
        if profile is not None:
            modelled += 1
            assert 0 < floors.floor(need, card) <= profile.total, (op, direction)
            lost = profiles.losses(need, profile, card)
            assert sum(lost.values()) == pytest.approx(profile.total - floors.floor(need, card))
            assert lost["overlap"] >= -1e-9
            assert lost["tail"] >= -1e-9
    assert modelled == 6
    for training in (False, True):
        for dense in (False, True):
            parts = profiles.encoder_time(rows, config, batch, architecture, training=training, dense=dense)
            assert all(least <= allowed for least, allowed in parts.values())
            assert (parts["embedding"][0] == 0) == dense


def test_kernels_without_a_model_count_for_their_bytes() -> None:
    """Two cells of 52 positions and 7 tokens: gradients in and the table's out; sums of chunks in, of cells out; what
    two blocks of keys have found of their maximum for each of two heads, and the projection for each."""
    embedding = Shape((3, 4), 128, 2, H100)
    favor = Shape((52, 52), 16, 2, H100)
    found = {
        (op, direction): profiles.bytes_without_model(
            SMALL, op, direction, embedding if op == "expression_embedding" else favor
        )
        for op in OPS
        for direction in floors.DIRECTIONS
    }
    sums = {"sum_parts": 4 * (2 + 2) * 23 * 20}
    assert {where: moved for where, moved in found.items() if moved} == {
        ("expression_embedding", "backward"): {"grad_gene_table": 2 * 24 * (7 + 53) + 4 * 7},
        ("favor_attention", "forward"): sums,
        ("favor_attention", "backward"): sums | {"grad_key_max": 12 * 2 * 2 * 2 + 2 * 2 * 23 * 20},
    }
    named = {(op, kernel) for (op, _), kernels in found.items() for kernel in kernels}
    for op, spec in OPS.items():
        if any(kernel.work for kernel in spec.kernels.values()):
            assert {(op, name) for name, kernel in spec.kernels.items() if kernel.work is None} <= named


def test_the_dense_floor_is_that_of_its_closed_form() -> None:
    """19,264 genes a cell: linear layers and attention of dense_flops at the peak."""
    from xtrimogene.network.flops import dense_flops

    config, batch = floors.model_config(), floors.batch_of((700, 900))
    parts = profiles.encoder_time(_made_up(2), config, batch, "gfx942", training=False, dense=True)
    flops = dense_flops(config, 2)
    assert parts["linear layers"][0] == pytest.approx(flops.linear / 1_307.4e12 * 1e6)
    assert parts["attention"][0] == pytest.approx(flops.attention / 1_307.4e12 * 1e6)


def _profile(total: float, busiest: float, spread: float, unit: str) -> profiles.Profile:
    busy = dict.fromkeys(profiles.UNIT_NAMES, 0.0) | {unit: busiest}
    return profiles.Profile(total, busy, busiest, spread)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (_profile(10, 9, 9.5, "shared"), "shared memory: more to do than the floor counts (89% of the loss)"),
        (
            _profile(10, 2, 9.5, "products"),
            "units wait for each other (83% of the loss); busiest: matrix products, 20%",
        ),
        (_profile(10, 2, 2.5, "exp2"), "the last programs run alone (83% of the loss); busiest: exponentials"),
    ],
)
def test_why_names_the_largest_loss(profile: profiles.Profile, words: str) -> None:
    card: Card = H100
    assert words in page.why(Need(989_400_000, 132 * 16 * 1_830, 0), profile, card)


def test_the_slowest_set_of_flags_counts() -> None:
    config, rows = floors.model_config(), _made_up(2)
    shape = profiles.shape_of(config, "ragged_attention", (700, 900), H100)
    usual = profiles.op_profile(rows, config, "ragged_attention", "forward", "sm_90", shape)
    forward = next(row for row in rows if row["kernel"] == "forward" and row["architecture"] == "sm_90")
    crowded = profiles.op_profile(
        [{**forward, "resident_programs": "1"}, *rows], config, "ragged_attention", "forward", "sm_90", shape
    )
    assert usual is not None
    assert crowded is not None
    assert crowded.total > usual.total


def test_a_table_that_is_missing_or_broken_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"static\.configs --table"):
        profiles.table_rows(tmp_path / "none.csv")
    rows = _made_up(2)
    with pytest.raises(ValueError, match=r"expected compiled rows of .*grad_query"):
        page.document([row for row in rows if row["kernel"] != "grad_query"])
    with pytest.raises(ValueError, match="no registers left"):
        page.document([{**row, "error": "no registers left"} for row in rows])


def test_the_page_has_every_op_and_both_cards() -> None:
    made = page.document(_made_up(2))
    assert made == page.document(_made_up(2))
    for name in page.ARCHITECTURES:
        assert f"## {CARDS[name].name}\n" in made
    for op in OPS:
        assert made.count(f"| `{op}` | forward |") == 3  # counts, and once for each card
    shares = [int(share) for share in re.findall(r"(\d+)%", made)]
    assert shares
    assert all(0 <= share <= 100 for share in shares)


def test_the_committed_page_is_what_the_program_makes() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.document(read_rows(TABLE))
