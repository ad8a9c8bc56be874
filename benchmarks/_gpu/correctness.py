"""Part a: whether the GPU computes what the CPU does."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import stpredict as stp
from _gpu import device as dev
from _gpu.data import small_network
from _gpu.kernels import attention, speeds, train_steps
from _gpu.part import Part

QUIET = {"enable_progress_bar": False}
TOLERANCE = {"float64": 1e-8, "float32": 1e-4, "bf16": 2e-2}
# A fit stops where a step gains less than this, and rounding decides in which step that is.
NSL_TOLERANCE = 1e-4


class Checks:
    """A list of what was compared, how far it was apart, and how far it may be."""

    def __init__(self, part: Part) -> None:
        self.part, self.rows = part, list[dict[str, Any]]()

    def run(self, name: str, measure: Callable[[], float | str], limit: float | str, *, least: bool = False) -> None:
        """Keep one check: a number against its limit, at most or with ``least`` at least; or a text that has to be in a message."""
        if self.part.left() < 5:
            self._keep({"name": name, "left_out": "no time was left"})
            return
        row: dict[str, Any] = {"name": name, "limit": limit}
        start = time.perf_counter()

        def measured() -> None:
            found = measure()
            row["found"] = str(found) if found != found else found  # JSON has no NaN
            if isinstance(found, str):
                row["passed"] = str(limit) in found
            else:
                row["passed"] = bool(found >= limit if least else found <= limit)  # type: ignore[operator]  # False for NaN

        self.part.attempt("last", measured)
        last = self.part.results.pop("last")
        row["seconds"] = time.perf_counter() - start
        if last is not None:
            row |= {"passed": False, **last}
        self._keep(row)

    def leave_out(self, name: str, why: str) -> None:
        """Say that a check could not be made."""
        self._keep({"name": name, "left_out": why})

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.part.note("checks", self.rows)


def run(part: Part) -> None:
    """Make all checks."""
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32 here
    checks = Checks(part)
    sdata = stp.datasets.synthetic(2, n_spots=12 if part.rehearse else 60, n_genes=20)
    check_networks(checks)
    if part.bf16:
        part.attempt("attention kernels", lambda: attention(part, lambda rows: part.note("attention kernels", rows)))
    check_graphs(checks)
    check_memory(checks, sdata)
    check_fits(checks, sdata)
    for prefix, check in (("NSL", check_nsl), ("ridge", check_ridge), ("device=", check_devices)):
        if not any(name.startswith(prefix) for name in part.have):
            check(checks, sdata)


def apart(a: Any, b: Any) -> float:
    """Distance of two arrays over the size of the second."""
    a, b = (np.asarray(torch.as_tensor(x).detach().cpu().double()) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def together(a: np.ndarray, b: np.ndarray) -> float:
    """Lowest correlation of a column of two arrays."""
    a, b = (x - x.mean(axis=0) for x in (a.astype(float), b.astype(float)))
    return float(((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))).min())


def check_networks(checks: Checks) -> None:
    """Output, gradient and one step of plain gradient descent, in three precisions."""
    part = checks.part
    torch.manual_seed(0)
    small = stp.models.M2OSTModule.from_preset("small", 20, **small_network(rehearse=part.rehearse))
    size = small.config["image_size"]
    images = torch.randint(0, 256, (3, 3, 3, size, size), dtype=torch.uint8)
    target = torch.randn(3, 20, dtype=torch.float64)

    def outcome(device: str, precision: str) -> list[torch.Tensor]:
        dtype = torch.float64 if precision == "float64" else torch.float32
        network = copy.deepcopy(small).to(device, dtype)
        before = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
        optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            predicted = network(images.to(device))
        (predicted.double() - target.to(device)).square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in network.parameters()])  # type: ignore[union-attr]
        optimiser.step()
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        return [predicted, gradient, after - before]

    expected = {"float64": outcome("cpu", "float64"), "float32": outcome("cpu", "float32")}
    expected["bf16"] = expected["float32"]
    for precision, limit in TOLERANCE.items():
        names = [f"M2OST {what}, {precision}" for what in ("output", "gradient", "SGD step")]
        if precision == "bf16" and not part.bf16:
            for name in names:
                checks.leave_out(name, "the card has no bfloat16")
            continue
        found: list[torch.Tensor] = []
        for i, name in enumerate(names):

            def measure(i: int = i, precision: str = precision, found: list[torch.Tensor] = found) -> float:
                if not found:
                    found.extend(outcome(part.device, precision))
                return apart(found[i], expected[precision][i])

            # A step is a difference of weights, and holds their rounding.
            checks.run(name, measure, limit if i < 2 or precision != "float32" else 10 * limit)


def check_graphs(checks: Checks) -> None:
    """Steps captured as CUDA graphs, against the same without."""
    part = checks.part
    found: dict[bool, dict[str, Any]] = {}

    def both() -> dict[bool, dict[str, Any]]:
        for enabled in (True, False):
            if enabled not in found:
                found[enabled] = train_steps(part, 2 if part.rehearse else 8, 5, "32", enabled=enabled)
        return found

    def measure(what: str) -> float:
        return apart(both()[True][what], both()[False][what])

    checks.run("graphs: losses of five steps, float32", lambda: measure("losses"), 1e-5)
    checks.run("graphs: weights after five steps, float32", lambda: measure("weights"), 1e-5)
    if part.cuda:
        checks.run("CUDA graphs are used", lambda: "; ".join(both()[True]["said"]) or "not tried", "are captured")
    else:
        checks.leave_out("CUDA graphs are used", "only a GPU has them")
    part.attempt(
        "steps", lambda: speeds(part, lambda rows: part.note("steps", rows)), seconds=0 if part.rehearse else 12
    )


# What histograms are made with by default.
READS = {"kind": "histogram", "bits": 5, "spot_scale": 2.0}


def check_nsl(checks: Checks, sdata: Any) -> None:
    """One step of the solver, which is algebra alone; a whole fit; and predictions of one model."""
    part = checks.part
    histogram = stp.pp.color_histogram(sdata, inplace=False)
    fractions = histogram.counts.multiply(1 / np.maximum(histogram.n_pixels, 1)[:, None]).tocsr()
    expression = sdata["table"].X.toarray()
    expression = expression[:, expression.std(axis=0) > 0]
    genes = [str(i) for i in range(expression.shape[1])]
    reference = stp.tl.fit_nsl(sdata, genes=2, inplace=False, device="cpu").reference

    def fit(device: str, **kwargs: Any) -> Any:
        return stp.models.NSL.fit(
            fractions, histogram.od, expression, genes, reference=reference, reads=READS, device=device, **kwargs
        )

    expected = {"step": fit("cpu", max_iter=1), "whole": fit("cpu")}
    for what in ("stain_matrix", "weights", "intercept", "loss"):
        checks.run(
            f"NSL {what} after one step, float64",
            lambda what=what: apart(getattr(fit(part.device, max_iter=1), what), getattr(expected["step"], what)),
            TOLERANCE["float64"],
        )
    model = expected["whole"]
    checks.run("NSL loss of a whole fit", lambda: apart(fit(part.device).loss, model.loss), NSL_TOLERANCE)
    checks.run(
        "NSL predictions of a whole fit, lowest Pearson of a gene",
        lambda: together(*(m.predict(fractions, histogram.od, device="cpu") for m in (fit(part.device), model))),
        0.999,
        least=True,
    )
    checks.run(
        "NSL predictions of one model, rounded to float32",
        lambda: apart(*(model.predict(fractions, histogram.od, device=device) for device in (part.device, "cpu"))),
        1e-6,
    )


def check_ridge(checks: Checks, sdata: Any) -> None:
    """Ridge regression on what an encoder makes of patches."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 8, 8), nn.GELU(), nn.Conv2d(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )

    def predictions(device: str) -> np.ndarray:
        stp.tl.fit_ridge(sdata, features=encoder, image_size=32, device=device, key_added="check")
        return stp.get.predictions(sdata, "check").X

    expected = predictions("cpu")
    checks.run(
        "ridge on an encoder, predictions, float32",
        lambda: apart(predictions(checks.part.device), expected),
        TOLERANCE["float32"],
    )


def check_fits(checks: Checks, sdata: Any) -> None:
    """Two epochs on both; the same seed twice; a model that goes from one to the other and back."""
    part = checks.part

    def fit(device: str, precision: str = "32", **trainer_kwargs: Any) -> tuple[Any, np.ndarray]:
        model = stp.tl.fit_m2ost(
            sdata,
            preset="tiny",
            network_kwargs=small_network(rehearse=part.rehearse),
            max_epochs=2,
            device=device,
            precision=precision,
            key_added="check",
            trainer_kwargs={**QUIET, **trainer_kwargs},
        )
        return model, stp.get.predictions(sdata, "check").X

    expected, predicted = fit("cpu")
    kept: dict[str, Any] = {}

    def on_device() -> Any:
        if "fit" not in kept:
            kept["fit"] = fit(part.device)
        return kept["fit"]

    checks.run(
        "M2OST, training loss of two epochs, float32",
        lambda: apart(on_device()[0].history["train_loss"], expected.history["train_loss"]),
        1e-2,
    )
    checks.run(
        "M2OST, predictions after two epochs, lowest Pearson of a gene, float32",
        lambda: together(on_device()[1], predicted),
        0.999,
        least=True,
    )
    if part.bf16:
        checks.run(
            "M2OST, training loss of two epochs, bf16 against float32",
            lambda: apart(fit(part.device, "bf16")[0].history["train_loss"], expected.history["train_loss"]),
            TOLERANCE["bf16"],
        )

    def twice() -> float:
        precision = "bf16" if part.bf16 else "32"
        try:
            first, second = (fit(part.device, precision, deterministic=True)[0].network.state_dict() for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(False)  # the trainer leaves it on
        return float(sum((first[name] != second[name]).sum().item() for name in first))

    checks.run("the same seed twice, deterministic: weights that differ", twice, 0)

    def there_and_back() -> float:
        model = on_device()[0]
        with (
            tempfile.TemporaryDirectory() as folder,
            stp.pp.patches(sdata, image_size=model.network.config["image_size"]) as patches,
        ):
            expected = model.predict(patches, device=part.device, precision="32")
            loaded = stp.models.load(model.save(Path(folder) / "model"))
            found = loaded.predict(patches, device="cpu", precision="32")
            back = stp.models.load(loaded.save(Path(folder) / "again")).predict(
                patches, device=part.device, precision="32"
            )
        return max(apart(found, expected), apart(back, expected))

    checks.run("save on the device, load on the CPU, and back: predictions", there_and_back, TOLERANCE["float32"])


def check_devices(checks: Checks, sdata: Any) -> None:
    """Names of devices."""
    part = checks.part

    def gigabytes(device: str) -> float:
        before = dev.reset_peak(part.device)
        stp.tl.fit_nsl(sdata, genes=5, device=device, inplace=False)
        return dev.peak_gb(part.device, above=before) or 0.0

    if part.cuda:
        for name in ("auto", "cuda:0"):
            checks.run(
                f"device={name!r} takes memory of the GPU (GB)", lambda name=name: gigabytes(name), 1e-6, least=True
            )
        checks.run("device='cpu' takes none", lambda: gigabytes("cpu"), 0)
    else:
        checks.leave_out("device='auto' and 'cuda:0' take the GPU", "there is none")

    def message() -> str:
        try:
            stp.tl.fit_nsl(sdata, genes=5, device="cuda:99", inplace=False)
        except ValueError as error:
            return str(error)
        return "no error"

    checks.run("a GPU that is not there is an error", message, "GPUs, numbered from 0" if part.cuda else "no GPU here")


def check_memory(checks: Checks, sdata: Any) -> None:
    """A batch that cannot fit, and the fit after it on the same small memory."""
    part = checks.part
    names = ("a batch that does not fit: the message names the knob", "the fit after it works: loss")
    if not part.cuda:
        for name in names:
            checks.leave_out(name, "only a GPU's memory can be made small")
        return

    def fit(batch_size: int) -> Any:
        return stp.tl.fit_m2ost(
            sdata,
            preset="small",
            max_epochs=1,
            batch_size=batch_size,
            device=part.device,
            inplace=False,
            trainer_kwargs=QUIET,
        )

    def message() -> str:
        try:
            fit(len(sdata["table"]))
        except MemoryError as error:
            return str(error)
        return "no error"

    # Training takes some 60 MB a spot.
    with dev.at_most(2e9, part.device):
        checks.run(names[0], message, "Lower `batch_size`")
        checks.run(names[1], lambda: float(fit(4).history["train_loss"][-1]), 10.0)
