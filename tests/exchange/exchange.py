"""Write what stpredict makes in one environment, and read it in others: ``make test-exchange``."""

from __future__ import annotations

import argparse
import shutil
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import spatialdata as sd
from anndata import AnnData

import stpredict as stp


def write(folder: Path) -> None:
    """A slide with predictions of two models and scores, its table alone, both models, and the numbers apart."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sdata = stp.datasets.synthetic(n_spots=40, n_genes=8)
    table = sdata["table"]
    for section in ("S1", "S2"):  # names of spots are strings in most slides
        sdata[f"{section}_spots"].index = sdata[f"{section}_spots"].index.map("spot {}".format)
    table.obs["spot_id"] = table.obs["spot_id"].map("spot {}".format)
    table.obs["train"] = (table.obs["section"] == "S1").to_numpy()
    stp.tl.fit_nsl(sdata, train_key="train").save(folder / "nsl")
    stp.tl.fit_ridge(sdata, train_key="train").save(folder / "ridge")
    for key in ("nsl", "ridge"):
        stp.tl.score(sdata, key=key)
    np.savez(folder / "numbers.npz", **_numbers(table))  # type: ignore[arg-type]
    table.write_h5ad(folder / "table.h5ad")
    sdata.write(folder / "slide.zarr")


def read(folder: Path) -> None:
    """Numbers are those that were written, and all that is done with such a slide can be done."""
    written = dict(np.load(folder / "numbers.npz"))
    sdata = sd.read_zarr(folder / "slide.zarr")
    _assert_equal(_numbers(sdata["table"]), written)
    _assert_equal(_numbers(ad.read_h5ad(folder / "table.h5ad")), written)

    for key in ("nsl", "ridge"):
        stp.tl.score(sdata, key=key)
        stp.pl.scatter(sdata, sdata["table"].var_names[0], key=key)
    _assert_equal(_numbers(sdata["table"]), written)

    # Of the picture that was written: codecs of different versions decode JPEG a little differently.
    for key in ("nsl", "ridge"):
        stp.tl.predict(sdata, stp.models.load(folder / key), key_added=f"{key}_again")
        _assert_close(
            sdata["table"].layers[f"{key}_again"], written[f"layers/{key}"], f"predictions of the model {key}"
        )
    stp.tl.fit_nsl(sdata, train_key="train")
    _assert_close(sdata["table"].layers["nsl"], written["layers/nsl"], "predictions of a model that is fitted anew")


def _numbers(table: AnnData) -> dict[str, np.ndarray]:
    numbers = {f"layers/{key}": np.asarray(table.layers[key]) for key in ("nsl", "ridge")}
    numbers |= {f"var/{name}": table.var[name].to_numpy(np.float64) for name in ("nsl_pcc", "nsl_rmse", "ridge_pcc")}
    numbers["obs/train"] = table.obs["train"].to_numpy(bool)
    numbers["uns/stains"] = np.asarray(table.uns["nsl"]["stain_matrix"])
    numbers |= {f"uns/genes of {key}": _strings(table.uns[key]["genes"]) for key in ("nsl", "ridge")}
    numbers["obs/spot_id"] = _strings(table.obs["spot_id"])
    return numbers


def _strings(values: Iterable[object]) -> np.ndarray:
    """numpy 2.0 cannot make fixed-width strings of the variable-width ones that anndata reads."""
    return np.array([str(value) for value in values])


def _assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys(), (got.keys(), expected.keys())
    for name, values in expected.items():
        if values.dtype.kind == "f":
            _assert_close(got[name], values, name)
        else:
            np.testing.assert_array_equal(got[name], values, err_msg=name)


def _assert_close(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["write", "read"])
    parser.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    here = ", ".join(f"{name} {version(name)}" for name in ("anndata", "spatialdata", "pandas", "zarr"))
    for path in given.folders:
        (write if given.action == "write" else read)(path)
        print(f"{given.action} {path}: as it should be, with {here}")
