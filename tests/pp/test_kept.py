"""Histograms and statistics that a table keeps: taken while what they were made of is the same, else made anew."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import TableModel
from spatialdata.transformations import Scale, Translation, set_transformation

import stpredict as stp
from stpredict._data.elements import Elements
from stpredict._data.slide import Slide, open_slide
from stpredict.pp import _pass, _reads
from stpredict.pp._histogram import ColorHistogram, HistogramReads
from stpredict.pp._kept import row_fingerprints
from stpredict.pp._patches import PatchReads
from stpredict.pp._reads import field_of_view, needs_image, read_inputs, read_together, reads_of, shared_reads
from stpredict.pp._statistics import ColorStatistics, StatisticsReads

MakeSData = Callable[..., SpatialData]
SMALL: dict[str, Any] = {"size": (150, 190), "n_spots": 12, "n_genes": 3, "chunks": (3, 64, 100)}
HISTOGRAM, STATISTICS = HistogramReads(4, 1.5), StatisticsReads((1, 2))


def keep(sdata: SpatialData, **elements: Any) -> None:
    stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5, **elements)
    stp.pp.color_statistics(sdata, spot_scale=(1, 2), **elements)


def slide_of(sdata: SpatialData, **elements: Any) -> Slide:
    return open_slide(sdata, Elements(**elements), images=True)


def use(sdata: SpatialData, reads: Any = (HISTOGRAM, STATISTICS), **elements: Any) -> list[Any]:
    """What a model would work with."""
    found = _reads._count(slide_of(sdata, **elements), list(reads))
    return [found[each] for each in reads]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is counted in each tile of an image."""
    found: list[list[str]] = []
    original = _pass._count_tile

    def spy(block: Any, tile: Any, places: Any, *rest: Any) -> Any:
        found.append([reads.kind for reads in places])
        return original(block, tile, places, *rest)

    monkeypatch.setattr(_pass, "_count_tile", spy)
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, ColorStatistics):
            np.testing.assert_array_equal(one.values, other.values)
            assert one.names == other.names
            continue
        assert isinstance(one, ColorHistogram)
        np.testing.assert_array_equal(one.counts.toarray(), other.counts.toarray())
        for name in ("codebook", "mean_od", "coverage", "bits", "n_pixels", "od"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


def test_what_is_kept_is_taken(make_sdata: MakeSData, passes: list[list[str]]) -> None:
    sdata = make_sdata(2, **SMALL)
    expected = use(sdata)
    keep(sdata)
    passes.clear()
    assert_same(use(sdata), expected)
    assert not passes
    again = make_sdata(2, **SMALL)  # another object, made of the same
    again["table"] = sdata["table"].copy()
    assert_same(use(again), expected)
    assert not passes
    with read_inputs(slide_of(sdata), HISTOGRAM) as inputs:
        assert_same([inputs], expected[:1])
    assert not passes
    assert_same(
        use(sdata, [HistogramReads(3, 1.5), STATISTICS]), [use(again, [HistogramReads(3, 1.5)])[0], expected[1]]
    )
    assert passes
    assert all(kinds == ["histogram"] for kinds in passes), "the rest is taken"


def test_what_is_kept_survives_the_disk_without_a_chunk_read(
    on_disk: Path, chunk_reads: Counter[str], tmp_path: Path
) -> None:
    made = sd.read_zarr(on_disk)
    keep(made)
    expected = use(made)
    for way in ("zarr", "h5ad"):
        getattr(made["table"], f"write_{way}")(tmp_path / way)
        table = getattr(ad, f"read_{way}")(tmp_path / way)
        # An array is made of the list of regions, which spatialdata does not take.
        table.uns["spatialdata_attrs"]["region"] = list(table.uns["spatialdata_attrs"]["region"])
        sdata = sd.read_zarr(on_disk)
        sdata["table"] = table
        chunk_reads.clear()
        assert_same(use(sdata), expected)
        assert not chunk_reads, way
    del sdata["table"].uns["color_histogram"]
    assert_same(use(sdata), expected)
    assert set(chunk_reads.values()) == {1}


# What changes


def rename_channels(sdata: SpatialData) -> None:
    sdata.images["A_image"] = sdata["A_image"].assign_coords(c=["b", "g", "r"])


def paint_over(sdata: SpatialData) -> None:
    """In place, one pixel of the array that the image holds."""
    block = next(value for value in dict(sdata["A_image"].data.dask).values() if isinstance(value, np.ndarray))
    block[0, 30, 30] ^= 1


def replace_image(sdata: SpatialData) -> None:
    image = sdata["A_image"]
    sdata.images["A_image"] = image.copy(data=da.from_array(255 - image.data.compute(), chunks=(3, 64, 100)))


def crop_image(sdata: SpatialData) -> None:
    sdata["A_image"] = sdata["A_image"].isel(x=slice(0, 189))


def move_image(sdata: SpatialData) -> None:
    set_transformation(sdata["A_image"], Translation([1, 0], axes=("x", "y")), "A")


def scale_spots(sdata: SpatialData) -> None:
    set_transformation(sdata["A_spots"], Scale([0.99, 1.01], axes=("x", "y")), "A")


def widen_spots(sdata: SpatialData) -> None:
    sdata["A_spots"]["radius"] *= 1.1


def move_one_spot(sdata: SpatialData) -> None:
    places = sdata["A_spots"].geometry.to_numpy().copy()
    places[5] = type(places[5])(places[5].x + 1, places[5].y)
    sdata["A_spots"]["geometry"] = places


def swap_two_spots(sdata: SpatialData) -> None:
    index = list(sdata["A_spots"].index)
    index[0], index[1] = index[1], index[0]
    sdata["A_spots"].index = index


def reorder_rows(sdata: SpatialData) -> None:
    sdata["table"] = sdata["table"][np.roll(np.arange(24), 7)].copy()


def shuffle_what_is_kept(sdata: SpatialData) -> None:
    table = sdata["table"]
    order = np.roll(np.arange(24), 7)
    for name in list(table.obsm):
        table.obsm[name] = table.obsm[name][order]
    table.obs["color_histogram_coverage"] = table.obs["color_histogram_coverage"].to_numpy()[order]


def cut_rows(sdata: SpatialData) -> None:
    sdata["table"] = sdata["table"][1:].copy()


CHANGES = [
    *(rename_channels, paint_over, replace_image, crop_image, move_image),
    *(scale_spots, widen_spots, move_one_spot, swap_two_spots),
    *(reorder_rows, shuffle_what_is_kept, cut_rows),
]


@pytest.mark.parametrize("change", CHANGES)
def test_anything_else_is_counted_anew(
    make_sdata: MakeSData, passes: list[list[str]], change: Callable[[SpatialData], None]
) -> None:
    sdata = make_sdata(2, **SMALL)
    keep(sdata)
    change(sdata)
    passes.clear()
    found = use(sdata)
    assert passes
    assert all(sorted(kinds) == ["histogram", "statistics"] for kinds in passes), "in one pass"
    for key in ("color_histogram", "color_statistics"):
        del sdata["table"].uns[key]
    assert_same(found, use(sdata))


def test_other_settings_images_and_sections_are_counted_anew(make_sdata: MakeSData, passes: list[list[str]]) -> None:
    sdata = make_sdata(2, **SMALL)
    sdata["other"] = sdata["A_image"].copy(data=255 - sdata["A_image"].data)
    pictures = {"A_spots": "A_image"}
    keep(sdata, image_key=pictures)

    def is_counted(*reads: Any, **elements: Any) -> bool:
        passes.clear()
        use(sdata, reads, **{"image_key": pictures, **elements})
        return bool(passes)

    assert not is_counted(HISTOGRAM, STATISTICS)
    for reads in (
        HistogramReads(5, 1.5),
        HistogramReads(4, 1.6),
        StatisticsReads((1,)),
        StatisticsReads((1, 2.1)),
        StatisticsReads((1, 2, 3)),
    ):
        assert is_counted(reads), reads
    assert is_counted(HISTOGRAM, image_key={"A_spots": "other"})
    assert is_counted(STATISTICS, shapes_key="A_spots")
    stp.pp.color_statistics(sdata, spot_scale=(1, 2), image_key=pictures, shapes_key="A_spots", key_added="first")
    assert not is_counted(STATISTICS, shapes_key="A_spots"), "under another key"
    assert not is_counted(STATISTICS), "and that of before"


def test_images_that_cannot_be_identified_are_always_read(
    make_sdata: MakeSData, passes: list[list[str]], log: io.StringIO
) -> None:
    sdata = make_sdata(**SMALL)
    pixels = sdata["A_image"].data.compute()
    lazy = da.from_delayed(dask.delayed(lambda: pixels)(), pixels.shape, dtype=np.uint8)
    sdata.images["A_image"] = sdata["A_image"].copy(data=lazy)
    use(sdata)
    assert log.getvalue() == "", "nothing is kept, so nothing has to be identified"
    stp.pp.color_histogram(sdata, bits=4, spot_scale=1.5)
    assert log.getvalue().count("What is made of the image 'A_image' cannot be kept for another call") == 1
    stp.pp.color_statistics(sdata, spot_scale=(1, 2))
    passes.clear()
    before = log.tell()
    use(sdata)
    assert passes == [["histogram", "statistics"]]
    assert log.getvalue()[before:].count("cannot be kept") == 1, "once, for all that is read"


# What is damaged


def cut_columns(table: Any) -> None:
    table.obsm["color_histogram"] = table.obsm["color_histogram"][:, :-3]
    table.obsm["color_statistics"] = table.obsm["color_statistics"][:, :-1]


def lose_arrays(table: Any) -> None:
    del table.obsm["color_histogram"], table.obsm["color_statistics"]


def lose_mean(table: Any) -> None:
    del table.obsm["color_histogram_mean_od"], table.obsm["color_statistics"]


def lose_column(table: Any) -> None:
    del table.obs["color_histogram_coverage"], table.obsm["color_statistics"]


def lose_codebook(table: Any) -> None:
    del table.uns["color_histogram"]["codebook"], table.uns["color_statistics"]["reads"]


def lose_checksum(table: Any) -> None:
    del table.uns["color_histogram"]["checksum"], table.uns["color_statistics"]["checksum"]


def lose_identity(table: Any) -> None:
    del table.uns["color_histogram"]["made_of"], table.uns["color_statistics"]["made_of"]


def change_a_number(table: Any) -> None:
    table.obsm["color_histogram"].data[7] += 1
    table.obsm["color_statistics"][3, 3] += 1


def change_a_mean(table: Any) -> None:
    table.obsm["color_histogram_mean_od"][3, 2] = np.nan
    table.obsm["color_statistics"][3, 3] = np.nan


def change_a_color(table: Any) -> None:
    table.uns["color_histogram"]["codebook"][3, 0] += 16
    table.uns["color_statistics"]["checksum"] = "0" * 32


def make_words(table: Any) -> None:
    table.obsm["color_histogram"] = pd.DataFrame({"a": ["word"] * table.n_obs}, index=table.obs_names)
    table.obsm["color_statistics"] = sparse.csr_matrix(table.obsm["color_statistics"])


def make_text(table: Any) -> None:
    table.uns["color_histogram"] = "words"
    table.uns["color_statistics"]["reads"] = "words"


DAMAGES = [
    *(cut_columns, lose_arrays, lose_mean, lose_column, lose_codebook, lose_checksum, lose_identity),
    *(change_a_number, change_a_mean, change_a_color, make_words, make_text),
]


def test_what_is_damaged_is_made_anew(make_sdata: MakeSData, passes: list[list[str]], log: io.StringIO) -> None:
    sdata = make_sdata(**SMALL)
    keep(sdata)
    whole, expected = sdata["table"].copy(), use(sdata)
    for damage in DAMAGES:
        sdata["table"] = whole.copy()
        damage(sdata["table"])
        passes.clear()
        log.truncate(log.seek(0))
        assert_same(use(sdata), expected)
        assert passes, damage.__name__
        assert all(sorted(kinds) == ["histogram", "statistics"] for kinds in passes), damage.__name__
        if damage in (cut_columns, change_a_number, change_a_mean, lose_checksum):
            for key in ("color_histogram", "color_statistics"):
                assert f"What the table keeps under '{key}' is damaged or was changed" in log.getvalue()


@pytest.mark.parametrize("merge", [None, "same", "unique", "first", "only"])
def test_what_concatenation_merges_is_counted_anew(make_sdata: MakeSData, passes: list[list[str]], merge: Any) -> None:
    # Columns of the second slide's histogram are other colors than those of the first; anndata cuts them to equal number.
    sdata = make_sdata(2, **SMALL)
    dark = sdata["B_image"]
    sdata.images["B_image"] = dark.copy(data=dark.data // 2)
    parts = []
    for name in "AB":
        table = sdata["table"][(sdata["table"].obs["section"] == name).to_numpy()].copy()
        table.obs["region"] = pd.Categorical([f"{name}_spots"] * 12)
        table = TableModel.parse(
            table, region=f"{name}_spots", region_key="region", instance_key="spot_id", overwrite_metadata=True
        )
        alone = SpatialData(
            images={f"{name}_image": sdata[f"{name}_image"]}, shapes={f"{name}_spots": sdata[f"{name}_spots"]}
        )
        alone["table"] = table
        keep(alone)
        parts.append(alone["table"])
    joined = ad.concat(parts, uns_merge=merge)
    joined.uns.pop("spatialdata_attrs", None)
    joined.obs["region"] = pd.Categorical(joined.obs["region"].astype(str))
    expected = use(sdata)
    sdata["table"] = TableModel.parse(
        joined, region=["A_spots", "B_spots"], region_key="region", instance_key="spot_id"
    )
    passes.clear()
    assert_same(use(sdata), expected)
    assert passes


# What is shared


def test_what_several_models_read_is_read_once(on_disk: Path, chunk_reads: Counter[str]) -> None:
    sdata = sd.read_zarr(on_disk)
    expected = use(sdata)
    slide = slide_of(sdata)
    features = reads_of({"kind": "features", "sources": {"x": {"from": "statistics", "spot_scales": [1, 2]}}})
    patches = PatchReads(1, 8)
    chunk_reads.clear()
    with shared_reads({}):
        read_together(slide, [HISTOGRAM, features, patches])
        assert set(chunk_reads.values()) == {1}
        chunk_reads.clear()
        for part in (slide, slide_of(sdata)):
            with read_inputs(part, HISTOGRAM) as histogram, read_inputs(part, features) as statistics:
                assert_same([histogram], expected[:1])
                np.testing.assert_array_equal(statistics.arguments()[0], expected[1].values)
        assert not chunk_reads
        with read_inputs(slide, patches) as first:
            pixels = first.arguments()[0][:]
        chunk_reads.clear()
        with read_inputs(slide, patches) as again:
            np.testing.assert_array_equal(again.arguments()[0][:], pixels)
        assert not chunk_reads
    use(sdata)
    assert chunk_reads, "nothing is held for longer"


def test_shared_encoders_are_told_apart(make_sdata: MakeSData) -> None:
    slide, calls = slide_of(make_sdata(**SMALL)), []

    def encoder(factor: int) -> Any:
        def encode(patches: Any) -> Any:
            calls.append(factor)
            return factor * patches.mean(dim=(2, 3))

        return encode

    described = {"kind": "features", "sources": {"encoder": {"from": "encoder", "image_size": 8, "spot_scale": 1.0}}}
    one, two = encoder(1), encoder(2)
    found = []
    with shared_reads({}):
        for each in (one, two, one, two):
            with read_inputs(slide, reads_of(described, each)) as inputs:
                found.append(inputs.arguments()[0])
    assert calls == [1, 2]
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)
    np.testing.assert_array_equal(found[2], found[0])


def test_patches_are_closed_at_the_end(make_sdata: MakeSData) -> None:
    with read_inputs(slide_of(make_sdata(**SMALL)), PatchReads(1, 8)) as inputs:
        (patches,) = inputs.arguments()
        assert len(patches[:2]) == 2
    with pytest.raises(ValueError, match="These patches are closed"):
        patches[0]


def test_what_models_declare() -> None:
    described: list[dict[str, Any]] = [
        {"kind": "histogram", "bits": 4, "spot_scale": 1.5},
        {"kind": "patches", "levels": 3, "image_size": 16, "spot_scale": 1.25},
        {"kind": "features", "sources": {"X": {"from": "obsm"}}},
    ]
    made = [reads_of(each) for each in described]
    assert [reads.describe() for reads in made] == described
    assert [field_of_view(reads) for reads in made] == [1.5, 5.0, None]
    assert [needs_image(reads) for reads in made] == [True, True, False]
    for each in described[:2]:
        with pytest.raises(ValueError, match=f"`encoder` is given, but the model reads {each['kind']}"):
            reads_of(each, len)
    with pytest.raises(ValueError, match="The model reads 'sounds', which this version of stpredict does not know"):
        reads_of({"kind": "sounds"})


def test_fingerprints_of_rows() -> None:
    values = np.arange(12.0).reshape(4, 3)
    values[2] = values[0]
    found = row_fingerprints(values)
    assert found.dtype == np.int64
    assert found[0] == found[2]
    assert len(set(found)) == 3
    np.testing.assert_array_equal(row_fingerprints(np.asfortranarray(values)), found)
    np.testing.assert_array_equal(row_fingerprints(values[[3, 1]]), found[[3, 1]])
    assert row_fingerprints(np.empty((0, 3))).shape == (0,)
