"""The core against slow, literal transcriptions of the formulas, on every backbone's table."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from chains.chain import Chain
from chains.cut import Cut, NestedTree, Runs, SharedClusters
from chains.errors import ChainMismatch, CutError, NotCalibrated, WidthError
from chains.expand import expand, expand_tensor, merge, student, sum_runs
from chains.model import load_student, model_of
from chains.testing import pico_chain, random_tensors, with_own_norms
from chains.width import Width

PLAIN = ("resnet18", "resnet50")  # the contract suite, tests/contracts, holds every architecture to more
FAMILIES = {
    "tree": {},
    "tree over a half": {"merged_share": 0.5},
    "slices": {"merged_share": 0},
    "oskt": {"mode": "oskt"},
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> dict:
    return FAMILIES[request.param]


def literal_nested(tensor: np.ndarray, rows: np.ndarray, columns: np.ndarray | None) -> np.ndarray:
    """W'[i, k] = mean over i' with rows[i'] = i of the sum over k' with columns[k'] = k of W[i', k']; -1 goes out."""
    if columns is not None:
        summed = np.zeros((tensor.shape[0], columns.max() + 1, *tensor.shape[2:]), tensor.dtype)
        for old, new in enumerate(columns):
            if new >= 0:
                summed[:, new] += tensor[:, old]
        tensor = summed
    merged = np.zeros((rows.max() + 1, *tensor.shape[1:]), tensor.dtype)
    for old, new in enumerate(rows):
        if new >= 0:
            merged[new] += tensor[old]
    counts = np.bincount(rows[rows >= 0]).reshape(-1, *[1] * (tensor.ndim - 1))
    return merged / counts


def as_dtype(chain: Chain, dtype: type) -> dict[str, np.ndarray]:
    return {name: tensor.astype(dtype) for name, tensor in chain.tensors.items()}


def teacher_rows(chain: Chain, name: str, tensor: np.ndarray) -> np.ndarray:
    """Rows at teacher resolution: in oskt a cluster's row for each of its teacher channels."""
    partition = chain.partitions[chain.table.axes[name].rows[0]]
    if isinstance(partition, SharedClusters) and tensor.ndim > 1:
        return np.repeat(tensor, partition.sizes, axis=0)
    return tensor


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("name", PLAIN)
def test_expansion_equals_the_literal_formula(name: str, family: dict, dtype: type, tolerance: float) -> None:
    chain = pico_chain(architecture_name=name, **family)
    tensors = as_dtype(chain, dtype)
    for width in (*chain.ladder, Width(5), Width(4, (2, 3, 4))):
        cuts = chain.cuts(width)
        made = expand(tensors, chain.table.axes, cuts)
        for tensor, axes in chain.table.axes.items():
            columns = None if axes.columns is None else cuts.of(axes.columns).part_of()
            expected = literal_nested(
                teacher_rows(chain, tensor, tensors[tensor]), cuts.of(axes.rows).part_of(), columns
            )
            np.testing.assert_allclose(made[tensor], expected, rtol=tolerance, atol=tolerance * 10)
            assert made[tensor].shape == chain.table.tensor_shapes(width)[tensor]


def test_on_integers_in_parts_of_two_expansion_is_exact_to_the_bit() -> None:
    parts = Runs.between(np.arange(0, 17, 2))
    weights = np.random.default_rng(0).integers(-8, 9, (16, 16, 3, 3)).astype(np.float32)
    expected = literal_nested(weights, np.arange(16) // 2, np.arange(16) // 2)
    assert np.array_equal(merge(weights, parts, parts), expected)


@pytest.mark.parametrize("name", PLAIN)
def test_torch_and_numpy_are_one_function(name: str, family: dict) -> None:
    chain = pico_chain(architecture_name=name, **family)
    torches = {name: torch.from_numpy(tensor) for name, tensor in chain.tensors.items()}
    for width in chain.ladder:
        arrays = expand(chain.tensors, chain.table.axes, chain.cuts(width))
        tensors = expand(torches, chain.table.axes, chain.cuts(width))
        for tensor in arrays:
            assert np.array_equal(arrays[tensor], tensors[tensor].numpy()), tensor


def test_gradients_reach_every_channel_of_the_teacher() -> None:
    chain = pico_chain()
    torches = {name: torch.from_numpy(tensor).requires_grad_() for name, tensor in chain.tensors.items()}
    made = expand(torches, chain.table.axes, chain.cuts(chain.ladder[0]))
    sum((tensor * torch.rand_like(tensor)).sum() for tensor in made.values()).backward()
    assert all(bool((tensor.grad != 0).all()) for tensor in torches.values())


def test_a_window_of_rows_is_that_window_of_the_result() -> None:
    generator = np.random.default_rng(3)
    weights = generator.standard_normal((20, 12, 3, 3)).astype(np.float32)
    rows = NestedTree(np.arange(20), generator.permutation(19) + 1).cut(7).parts
    columns = NestedTree(np.arange(12), generator.permutation(11) + 1).cut(5).parts
    whole = merge(weights, rows, columns)
    assert all(np.array_equal(merge(weights, rows[i : i + 1], columns), whole[i : i + 1]) for i in range(7))


@pytest.mark.parametrize("name", PLAIN)
def test_expansion_leaves_its_input_alone(name: str) -> None:
    chain = pico_chain(architecture_name=name)
    before = {name: tensor.copy() for name, tensor in chain.tensors.items()}
    for width in chain.ladder:
        expand(chain.tensors, chain.table.axes, chain.cuts(width))
    assert all(np.array_equal(before[name], chain.tensors[name]) for name in before)


def composed(wide: Cut, narrow: Cut) -> Runs:
    """The parts of a narrower cut counted in parts of a wider one."""
    ends = np.append(narrow.parts.starts, narrow.parts.stops[-1])
    return Runs.between(np.searchsorted(wide.parts.starts, ends), len(wide))


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", PLAIN)
def test_merging_composes_when_means_are_weighted_by_part_size(name: str, share: float) -> None:
    chain = pico_chain(architecture_name=name, merged_share=share)
    tensors = as_dtype(chain, np.float64)
    wide, narrow = chain.cuts(chain.ladder[2]), chain.cuts(chain.ladder[0])
    at_wide = expand(tensors, chain.table.axes, wide)
    at_narrow = expand(tensors, chain.table.axes, narrow)
    for tensor, axes in chain.table.axes.items():
        sizes = wide.of(axes.rows).parts.sizes.reshape(-1, *[1] * (at_wide[tensor].ndim - 1))
        rows = composed(wide.of(axes.rows), narrow.of(axes.rows))
        sums = sum_runs(at_wide[tensor] * sizes, rows, axis=0)
        if axes.columns is not None:
            sums = sum_runs(sums, composed(wide.of(axes.columns), narrow.of(axes.columns)), axis=1)
        weights = narrow.of(axes.rows).parts.sizes.reshape(-1, *[1] * (sums.ndim - 1))
        np.testing.assert_allclose(sums / weights, at_narrow[tensor], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("name", PLAIN)
def test_a_full_width_nested_student_is_the_teacher_in_leaf_order(name: str, share: float) -> None:
    chain = pico_chain(architecture_name=name, merged_share=share)
    teacher = random_tensors(chain.table, chain.teacher, seed=0)
    made = expand(chain.tensors, chain.table.axes, chain.cuts(chain.teacher))
    for tensor, axes in chain.table.axes.items():
        undone = np.empty_like(made[tensor])
        undone[chain.partitions[axes.rows[0]].order] = made[tensor]
        if axes.columns is not None:
            undone[:, chain.partitions[axes.columns[0]].order] = undone.copy()
        assert np.array_equal(undone, teacher[tensor]), tensor


@pytest.mark.parametrize("name", PLAIN)
def test_a_full_width_student_embeds_like_the_teacher_in_its_own_channel_order(name: str) -> None:
    chain = pico_chain(architecture_name=name)
    statistics = chain.statistics[chain.teacher]
    own_order = dict(random_tensors(chain.table, chain.teacher, seed=0))
    for norm, (group,) in chain.table.batch_norms.items():
        for kind in ("running_mean", "running_var"):
            values = np.empty_like(statistics[f"{norm}.{kind}"])
            values[chain.partitions[group].order] = statistics[f"{norm}.{kind}"]
            own_order[f"{norm}.{kind}"] = values
    images = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    expected = model_of(name, chain.teacher, own_order).embed(images)
    made = load_student(chain, chain.teacher).embed(images)[:, torch.from_numpy(chain.lift(chain.teacher))]
    normalize = torch.nn.functional.normalize
    torch.testing.assert_close(normalize(made), normalize(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
def test_tied_rows_compute_one_function_at_every_width(name: str) -> None:
    """Rows equal and norms equal inside the narrowest parts: all widths embed alike once lifted (float64, 1e-10)."""
    chain = pico_chain(architecture_name=name)
    narrowest = chain.cuts(chain.ladder[0])
    tied, statistics = {}, {}
    for tensor, axes in chain.table.axes.items():
        cut = narrowest.of(axes.rows)
        tied[tensor] = merge(chain.tensors[tensor].astype(np.float64), cut.parts)[cut.part_of()]
    for norm, (group,) in chain.table.batch_norms.items():
        for kind in ("running_mean", "running_var"):
            statistics[f"{norm}.{kind}"] = chain.statistics[chain.ladder[0]][f"{norm}.{kind}"][
                narrowest[group].part_of()
            ]
    images = torch.rand(2, 3, 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lifted = [_embed_lifted(chain, tied, statistics, width, images) for width in chain.ladder]
    for embedding in lifted[1:]:
        torch.testing.assert_close(embedding, lifted[0], atol=1e-10, rtol=1e-10)


def _embed_lifted(
    chain: Chain, tensors: dict[str, np.ndarray], statistics: dict[str, np.ndarray], width: Width, images: torch.Tensor
) -> torch.Tensor:
    cuts = chain.cuts(width)
    made = expand(tensors, chain.table.axes, cuts)
    kept = {
        name: values[cuts.of(chain.table.batch_norms[name.rpartition(".")[0]]).parts.starts]
        for name, values in statistics.items()
    }
    model = model_of(chain.architecture, width, made | kept).double()
    model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    for name, values in (made | kept).items():  # model_of holds float32; put the exact doubles back
        entry = name if name.startswith("neck.") else f"backbone.{name}"
        model.state_dict()[entry].copy_(torch.from_numpy(values))
    return model.embed(images)[:, torch.from_numpy(chain.lift(width))].detach()


def test_oskt_students_repeat_the_shared_rows() -> None:
    chain = pico_chain(mode="oskt")
    made = student(chain, chain.teacher)
    clusters = chain.partitions["layer4"]
    assert isinstance(clusters, SharedClusters)
    expected = np.repeat(chain.tensors["layer4.0.downsample.0.weight"], clusters.sizes, axis=0)
    assert np.array_equal(made["layer4.0.downsample.0.weight"], expected)


def test_lifting_scales_cosines_by_part_sizes() -> None:
    chain = pico_chain()
    width = chain.ladder[1]
    native = np.random.default_rng(0).standard_normal((2, chain.table.embedding_dim(width)))
    lifted = native[:, chain.lift(width)]
    sizes = chain.cuts(width).of(chain.table.embedding_channels).parts.sizes
    scaled = native * np.sqrt(sizes)
    assert np.isclose(lifted[0] @ lifted[1], scaled[0] @ scaled[1])
    assert np.isclose(np.linalg.norm(lifted[0]), np.linalg.norm(scaled[0]))


def test_at_full_width_the_lift_undoes_the_leaf_order() -> None:
    chain = pico_chain()
    order = chain.partitions[chain.table.embedding_channels[0]].order
    assert np.array_equal(chain.lift(chain.teacher)[order], np.arange(len(order)))


def test_a_tensor_of_another_size_is_refused_by_name_and_group() -> None:
    chain = pico_chain()
    name = "layer3.0.conv2.weight"
    with pytest.raises(
        ChainMismatch, match=r"layer3\.0\.conv2\.weight has 31 channels where its group 'layer3' has 32"
    ):
        expand_tensor(name, chain.tensors[name][:31], chain.table.axes[name], chain.cuts(chain.ladder[0]))


def test_a_width_the_chain_cannot_give_is_refused() -> None:
    with pytest.raises(WidthError, match="the teacher 8x2-4-8 has 8"):
        pico_chain().cuts(Width(9))
    with pytest.raises(CutError, match="cannot give"):
        pico_chain(mode="oskt").cuts(Width(1))


def test_a_width_with_norms_of_its_own_takes_them_and_the_others_are_merged() -> None:
    merged = pico_chain()
    chain = with_own_norms(merged)
    own, without = chain.ladder[0], chain.ladder[-2]
    made, plain = student(chain, own), student(merged, own)
    for name, values in made.items():
        assert np.array_equal(values, chain.own_norms[own].get(name, plain[name])), name
    assert all(
        np.array_equal(values, student(merged, without)[name]) for name, values in student(chain, without).items()
    )


def test_a_width_without_statistics_is_refused() -> None:
    chain = replace(pico_chain(), statistics={})
    with pytest.raises(NotCalibrated, match="no normalisation statistics"):
        student(chain, chain.ladder[0])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "runs", [Runs.between(np.array([2, 3, 6, 8]), 9), Runs(np.array([4, 0]), np.array([7, 3]), 9)], ids=str
)
def test_torch_adds_runs_as_numpy_does_also_where_they_leave_gaps(runs: Runs, axis: int) -> None:
    tensor = np.random.default_rng(0).standard_normal((9, 9, 2), dtype=np.float32)
    assert np.array_equal(sum_runs(torch.from_numpy(tensor), runs, axis).numpy(), sum_runs(tensor, runs, axis))
