from __future__ import annotations

import gzip
import hashlib
import io
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anndata as ad
import imagecodecs
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import spatialdata as sd
from scipy import sparse
from spatialdata.transformations import get_transformation

import stpredict as stp
from stpredict.datasets import _her2st, _registry
from stpredict.datasets._image import multiscale_image

# A miniature of the published set: two sections on grids of 20 px, whose spots are jittered around the grid. Section
# C3 lists a spot without counts and one with counts that is not under tissue, and its genes differ from those of C2.
SECTIONS: dict[str, dict] = {
    "C2": {
        "under_tissue": ["2x3", "3x3", "4x3", "2x4", "3x4"],
        "counts": {"3x4": [1, 0, 5], "2x3": [0, 2, 0], "4x3": [7, 0, 1], "2x4": [0, 0, 0], "3x3": [3, 1, 1]},
        "genes": ["ERBB2", "ZEB1", "ACTB"],
        "image": (60, 1100),
    },
    "C3": {
        "under_tissue": ["5x1", "6x1", "5x2", "6x2"],
        "counts": {"6x2": [4, 1], "5x1": [0, 9], "30x30": [50, 50], "6x1": [2, 2]},
        "genes": ["KRT8", "ZEB1"],
        "image": (70, 1200),
    },
}
PITCH = 20.0


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Folder with the miniature's files as they lie on the server, and ``files.tsv``, which pins them."""
    folder = tmp_path / "published"
    rng = np.random.default_rng(0)
    for name, section in SECTIONS.items():
        spots = pd.DataFrame([list(map(int, spot.split("x"))) for spot in section["under_tissue"]], columns=["x", "y"])
        for axis in "xy":
            spots[f"new_{axis}"] = spots[axis] + rng.uniform(-0.1, 0.1, len(spots)).round(3)
            spots[f"pixel_{axis}"] = (PITCH * spots[f"new_{axis}"] - 10).round(2)
        _write(folder / f"ST-spotfiles/{name}_selection.tsv", spots.to_csv(sep="\t", index=False).encode())
        counts = pd.DataFrame.from_dict(section["counts"], orient="index", columns=section["genes"])
        _write(folder / f"ST-cnts/{name}.tsv.gz", gzip.compress(counts.to_csv(sep="\t").encode(), mtime=0))
        pixels = rng.integers(0, 256, (*section["image"], 3), dtype=np.uint8)
        _write(folder / f"ST-imgs/C/{name}/{name}_HE.jpg", imagecodecs.jpeg8_encode(pixels))
    rows = ["# path\tbytes\tsha256\tgit_blob_sha1"]
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        # As in the published list, only the git blob id is known of some images.
        known = ("", "") if file.name == "C3_HE.jpg" else (str(len(content)), hashlib.sha256(content).hexdigest())
        rows.append("\t".join([file.relative_to(folder).as_posix(), *known, blob]))
    _write(tmp_path / "files.tsv", "\n".join(rows).encode())
    return folder


def _write(file: Path, content: bytes | bytearray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback and keeps the paths that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, list[str]()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.directory = str(self.server.folder)
        self.server.requests.append(self.path.lstrip("/"))
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(published: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The miniature, published on loopback; `her2st` knows of nothing else."""
    with Server(published) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(_her2st, "BASE_URL", server.url)
        monkeypatch.setattr(_registry.resources, "files", lambda _: published.parent)
        monkeypatch.setattr(_her2st, "read_registry", lambda _: _registry.read_registry("files.tsv"))
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What scanpy's logger says, from level info on."""
    settings = sc.settings.verbosity, sc.settings.logfile
    sc.settings.verbosity, sc.settings.logfile = "info", io.StringIO()
    yield sc.settings.logfile
    sc.settings.verbosity, sc.settings.logfile = settings


def _tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, with times and sizes: equal before and after means that nothing was written."""
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*"))}


# What is loaded


def test_elements_of_a_section(server: Server, cache: Path) -> None:
    sdata = stp.datasets.her2st("C2", path=cache)
    assert set(sdata.images) == {"C2_image"} and set(sdata.shapes) == {"C2_spots"} and set(sdata.tables) == {"table"}
    assert sdata.coordinate_systems == ["C2"]

    image = sdata["C2_image"]["scale0"].image
    jpeg = (cache / "her2st/ST-imgs/C/C2/C2_HE.jpg").read_bytes()
    assert image.dtype == np.uint8
    assert list(image.c.values) == ["r", "g", "b"]
    np.testing.assert_array_equal(image.values.transpose(1, 2, 0), imagecodecs.jpeg8_decode(jpeg))

    table = sdata["table"]
    spots = pd.read_csv(cache / "her2st/ST-spotfiles/C2_selection.tsv", sep="\t")
    circles = sdata["C2_spots"].loc[table.obs["spot_id"]]
    for i, name in enumerate(table.obs_names):
        x, y = map(int, name.removeprefix("C2_").split("x"))
        row = spots[(spots.x == x) & (spots.y == y)].iloc[0]
        assert (circles.geometry.x.iloc[i], circles.geometry.y.iloc[i]) == (row.pixel_x, row.pixel_y)
        assert (table.obs["array_col"].iloc[i], table.obs["array_row"].iloc[i]) == (x, y)
    np.testing.assert_allclose(sdata["C2_spots"].radius, PITCH / 4, rtol=1e-3)  # 100 µm of a pitch of 200 µm
    assert table.uns["her2st"]["mpp"]["C2_spots"] == pytest.approx(200 / PITCH, rel=1e-3)


def test_counts_of_several_sections_share_the_union_of_genes(server: Server, cache: Path) -> None:
    table = stp.datasets.her2st(["C3", "C2"], path=cache)["table"]
    assert list(table.var_names) == ["KRT8", "ZEB1", "ERBB2", "ACTB"]  # in order of first appearance
    assert list(table.var["n_sections"]) == [1, 2, 1, 1]
    expected = pd.DataFrame(
        {
            f"{name}_{spot}": dict(zip(SECTIONS[name]["genes"], counts, strict=True))
            for name in SECTIONS
            for spot, counts in SECTIONS[name]["counts"].items()
            if spot in SECTIONS[name]["under_tissue"]
        }
    ).fillna(0)
    assert set(table.obs_names) == set(expected.columns)  # C3 lost 5x2 (no counts) and 30x30 (not under tissue)
    np.testing.assert_array_equal(
        table.to_df(layer="counts").T, expected.loc[list(table.var_names), list(table.obs_names)]
    )
    assert list(table.obs["section"].unique()) == ["C3", "C2"]
    assert (table.obs["patient"] == "C").all()
    assert table.var_names.is_unique and table.obs_names.is_unique
    assert list(table.obs["spot_id"]) == list(table.obs_names)


def test_x_is_log1p_of_counts_per_ten_thousand(server: Server, cache: Path) -> None:
    table = stp.datasets.her2st(path=cache)["table"]
    counts = table.layers["counts"]
    assert isinstance(counts, sparse.csr_matrix) and isinstance(table.X, sparse.csr_matrix)
    assert counts.dtype == table.X.dtype == np.float32
    dense = counts.toarray()
    total = np.maximum(dense.sum(1, keepdims=True), 1)  # C2_2x4 has no counts at all
    np.testing.assert_allclose(table.X.toarray(), np.log1p(dense / total * 1e4), rtol=1e-5)


def test_dropped_spots_are_logged(server: Server, cache: Path, log: io.StringIO) -> None:
    stp.datasets.her2st(path=cache)
    assert "C3: 3 spots; left out 1 under tissue without counts and 1 with counts that are not under" in log.getvalue()
    assert "C2:" not in log.getvalue()


def test_every_section_has_its_own_coordinate_system(server: Server, cache: Path) -> None:
    sdata = stp.datasets.her2st(path=cache)
    for name in SECTIONS:
        for key in (f"{name}_image", f"{name}_spots"):
            assert set(get_transformation(sdata[key], get_all=True)) == {name}


def test_round_trip_through_zarr_and_h5ad(server: Server, cache: Path, tmp_path: Path) -> None:
    sdata = stp.datasets.her2st(path=cache)
    sdata.write(tmp_path / "sdata.zarr")
    sdata["table"].write_h5ad(tmp_path / "table.h5ad")
    read = sd.read_zarr(tmp_path / "sdata.zarr")
    np.testing.assert_array_equal(read["C3_image"]["scale0"].image, sdata["C3_image"]["scale0"].image)
    np.testing.assert_array_equal(read["C3_spots"].radius, sdata["C3_spots"].radius)
    for table in (read["table"], ad.read_h5ad(tmp_path / "table.h5ad")):
        pd.testing.assert_frame_equal(table.obs, sdata["table"].obs, check_categorical=False)
        np.testing.assert_array_equal(table.X.toarray(), sdata["table"].X.toarray())
        assert table.uns["her2st"] == sdata["table"].uns["her2st"]
    _, rows = sd.join_spatialelement_table(
        sdata=read, spatial_element_names="C3_spots", table_name="table", how="inner"
    )
    assert list(rows.obs_names) == list(sdata["C3_spots"].index)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (["C2", "Z9"], r"\['C2', 'Z9'\]; expected one or more of C2, C3"),
        ("c2", "'c2'; expected one or more of C2, C3"),
        ([], r"\[\]; expected one or more of"),
        (["C2", "C3", "C2"], "names C2 more than once"),
    ],
)
def test_wrong_sections(server: Server, sections: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stp.datasets.her2st(sections)
    assert not server.requests


def test_scales_are_rounded_means_on_chunks_of_1024() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1500, 2101), dtype=np.uint8)
    image = multiscale_image(pixels, "A")
    assert [scale.image.shape for scale in image.values()] == [(3, 1500, 2101), (3, 750, 1050), (3, 375, 525)]
    assert image["scale0"].image.data.chunksize == (3, 1024, 1024)
    blocks = pixels[:, :, :2100].reshape(3, 750, 2, 1050, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(image["scale1"].image, np.floor(blocks + 0.5))
    assert set(get_transformation(image, get_all=True)) == {"A"}


# Where it comes from


def test_only_missing_files_are_downloaded(server: Server, cache: Path) -> None:
    stp.datasets.her2st("C2", path=cache)
    assert sorted(server.requests) == ["ST-cnts/C2.tsv.gz", "ST-imgs/C/C2/C2_HE.jpg", "ST-spotfiles/C2_selection.tsv"]
    server.requests.clear()
    (cache / "her2st/ST-cnts/C2.tsv.gz").unlink()
    stp.datasets.her2st(["C2"], path=cache)
    assert server.requests == ["ST-cnts/C2.tsv.gz"]


def test_full_cache_is_only_read(server: Server, cache: Path) -> None:
    stp.datasets.her2st(path=cache)
    before = _tree(cache)
    server.requests.clear()
    stp.datasets.her2st(path=cache)
    assert _tree(cache) == before
    assert not server.requests


def test_cache_folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry.pooch, "os_cache", lambda project: tmp_path / "os" / project)
    monkeypatch.delenv("STPREDICT_DATA_DIR", raising=False)
    stp.datasets.her2st("C2")
    assert (tmp_path / "os/stpredict/her2st/ST-cnts/C2.tsv.gz").exists()
    monkeypatch.setenv("STPREDICT_DATA_DIR", str(tmp_path / "env"))
    stp.datasets.her2st("C2")
    assert (tmp_path / "env/her2st/ST-cnts/C2.tsv.gz").exists()
    stp.datasets.her2st("C2", path=tmp_path / "path")  # goes before the environment
    assert (tmp_path / "path/her2st/ST-cnts/C2.tsv.gz").exists()


@pytest.mark.parametrize(
    ("file", "mismatch"),
    [
        ("ST-imgs/C/C2/C2_HE.jpg", "SHA-256"),
        ("ST-imgs/C/C3/C3_HE.jpg", "git blob id"),  # nothing else is known of it
    ],
)
def test_damaged_cache_file_is_named_and_replaced(
    server: Server, published: Path, cache: Path, log: io.StringIO, file: str, mismatch: str
) -> None:
    stp.datasets.her2st(path=cache)
    cached = cache / "her2st" / file
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, same size
    cached.write_bytes(content)
    server.requests.clear()
    stp.datasets.her2st(path=cache)
    assert server.requests == [file]
    assert cached.read_bytes() == (published / file).read_bytes()
    assert f"WARNING: {cached} is damaged or was replaced (its {mismatch} is" in log.getvalue()


def test_truncated_cache_file_is_replaced(server: Server, published: Path, cache: Path) -> None:
    stp.datasets.her2st("C2", path=cache)
    cached = cache / "her2st/ST-cnts/C2.tsv.gz"
    cached.write_bytes(cached.read_bytes()[:-5])
    stp.datasets.her2st("C2", path=cache)
    assert cached.read_bytes() == (published / "ST-cnts/C2.tsv.gz").read_bytes()


@pytest.mark.parametrize("name", ["C2", "C3"])
def test_wrong_content_from_the_server_never_enters_the_cache(
    server: Server, published: Path, cache: Path, name: str
) -> None:
    _write(published / f"ST-imgs/C/{name}/{name}_HE.jpg", b"<html>Please log in</html>")
    with pytest.raises(ValueError, match=f"{server.url}.*{name}_HE.jpg did not deliver the expected file") as error:
        stp.datasets.her2st(name, path=cache)
    assert str(cache / f"her2st/ST-imgs/C/{name}/{name}_HE.jpg") in str(error.value)
    assert not [p for p in cache.rglob("*") if "HE" in p.name or "download" in p.name]


def test_missing_on_the_server(server: Server, published: Path, cache: Path) -> None:
    (published / "ST-cnts/C2.tsv.gz").unlink()
    with pytest.raises(OSError, match=r"Could not download .*ST-cnts/C2\.tsv\.gz to .*404.*STPREDICT_DATA_DIR"):
        stp.datasets.her2st("C2", path=cache)


def test_damaged_file_off_line(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stp.datasets.her2st("C2", path=cache)
    cached = cache / "her2st/ST-cnts/C2.tsv.gz"
    cached.write_bytes(b"?")
    monkeypatch.setattr(_her2st, "BASE_URL", "http://127.0.0.1:9/")  # nobody listens
    with pytest.raises(OSError, match="Could not download") as error:
        stp.datasets.her2st("C2", path=cache)
    assert f"The file at {cached} is damaged or was replaced (it has 1 bytes" in str(error.value)
    assert cached.read_bytes() == b"?"  # a file that somebody put there is kept until there is a better one


def test_damaged_file_in_a_cache_that_cannot_be_written(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stp.datasets.her2st("C2", path=cache)
    cached = cache / "her2st/ST-cnts/C2.tsv.gz"
    cached.write_bytes(b"?")

    def refuse(*args: object, **kwargs: object) -> None:  # permissions would not stop root
        raise PermissionError(13, "Permission denied", str(cached.parent))

    monkeypatch.setattr(_registry.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(OSError, match=r"Permission denied.*is damaged or was replaced"):
        stp.datasets.her2st("C2", path=cache)


def test_published_list_is_complete() -> None:
    sections = _her2st._published_sections()
    numbers = {"A": 6, "B": 6, "C": 6, "D": 6, "E": 3, "F": 3, "G": 3, "H": 3}
    assert list(sections) == [f"{patient}{i + 1}" for patient, n in numbers.items() for i in range(n)]
    for files in sections.values():
        assert all(len(file.git_blob) == 40 and (not file.sha256 or len(file.sha256) == 64) for file in files)


# Real sections


def test_real_section(her2st_dir: Path) -> None:
    sdata = stp.datasets.her2st("C4", path=her2st_dir)
    table = sdata["table"]
    with gzip.open(her2st_dir / "her2st/ST-cnts/C4.tsv.gz", "rt") as file:
        genes = next(file).rstrip("\n").split("\t")[1:]
        counts = {spot: np.array(row.split("\t"), int) for spot, _, row in (line.partition("\t") for line in file)}
    assert list(table.var_names) == genes
    assert table.n_obs == 184  # 187 under tissue, 3 of them without counts
    for name, row in zip(table.obs_names, table.layers["counts"], strict=True):
        np.testing.assert_array_equal(row.toarray()[0], counts[name.removeprefix("C4_")])

    # Neighbours on the grid lie one pitch apart along the image's axes, up to the array's rotation.
    mpp = table.uns["her2st"]["mpp"]["C4_spots"]
    assert 0.68 < mpp < 0.70
    np.testing.assert_allclose(sdata["C4_spots"].radius * 2 * mpp, 100)

    # Circles lie on tissue: mean OD under their centres is far above that of the slide's margin.
    image = sdata["C4_image"]["scale0"].image
    od = -np.log((image.sel(c="g").values[:, :9000].astype(float) + 1) / 256)
    centers = sdata["C4_spots"].geometry
    under_spots = od[centers.y.astype(int), centers.x.astype(int)]
    assert np.median(under_spots) > 2 * np.median(od[:1000])
