"""Time and memory of scoring, as a table and JSON.

    OMP_NUM_THREADS=2 python benchmarks/score_speed.py                  # everything, some minutes
    OMP_NUM_THREADS=2 python benchmarks/score_speed.py --only genes     # one case

18,000 genes and 5,000 spots, of which each gene is seen in 3 to 60 %, as on a Visium slide; in one section, and in four. Each
case runs in a process of its own, so that its peak memory is its own. CPU seconds are those of all threads: on a busy machine
they say more than seconds. The case "bounds" says what the time of "genes" goes into: how long the same machine takes, in one
thread, to do nothing but sort all values, multiply them by the graph of neighbours, or read them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

N_GENES, N_SPOTS = 18_000, 5_000


def slide(n_sections: int) -> SpatialData:
    """Spots on hexagonal grids, Poisson counts, their log-normalised values and predictions of them; no image."""
    rng = np.random.default_rng(0)
    n = N_SPOTS // n_sections
    side = int(np.ceil(np.sqrt(n)))
    grid = np.indices((side, side)).reshape(2, -1).T[:n].astype(float)
    xy = 100 * np.column_stack([grid[:, 1] + 0.5 * (grid[:, 0] % 2), grid[:, 0] * np.sqrt(3) / 2])
    maps = np.sin(xy @ rng.normal(0, 3e-3, (2, 5)))
    names = [f"s{i}" for i in range(n_sections)]
    maps = np.tile(maps, (n_sections, 1))
    weights = rng.normal(0, 0.5, (5, N_GENES))
    level = np.log(-np.log1p(-rng.uniform(0.03, 0.6, N_GENES)))
    counts, predicted = [], np.empty((len(maps), N_GENES), dtype=np.float32)
    for spots in np.array_split(np.arange(len(maps)), 20):
        rate = np.exp(level + maps[spots] @ weights)
        counts.append(sp.csr_matrix(rng.poisson(rate).astype(np.float32)))
        predicted[spots] = np.log1p(rate) + 0.1 * rng.standard_normal(rate.shape, dtype=np.float32)
    whole = sp.csr_matrix(sp.vstack(counts))
    normalized = sp.csr_matrix(sp.diags_array(1e4 / np.asarray(whole.sum(axis=1)).ravel()) @ whole).astype(np.float32)
    normalized.data = np.log1p(normalized.data)
    obs = pd.DataFrame(
        {"region": pd.Categorical(np.repeat(names, n)), "spot": np.tile(np.arange(n), n_sections)},
        index=[f"{name}_{i}" for name in names for i in range(n)],
    )
    table = AnnData(normalized, obs=obs, layers={"counts": whole, "predicted": predicted})
    table.var_names = [f"g{i}" for i in range(N_GENES)]
    return SpatialData(
        shapes={name: ShapesModel.parse(xy, geometry=0, radius=27.5) for name in names},
        tables={"table": TableModel.parse(table, region=names, region_key="region", instance_key="spot")},
    )


def scoring(n_sections: int, n_genes: int, n_perms: int) -> Callable[[], dict[str, Any]]:
    """Score some genes of a slide."""
    import stpredict as stp

    sdata = slide(n_sections)
    table = sdata["table"]
    genes = None if n_genes == N_GENES else list(table.var_names[:n_genes])

    def run() -> dict[str, Any]:
        stp.tl.score(sdata, key="predicted", genes=genes, n_perms=n_perms)
        return {
            "genes": n_genes,
            "spots": table.n_obs,
            "sections": n_sections,
            "permutations": n_perms,
            "share_not_zero": table.X.nnz / table.n_obs / table.n_vars,
        }

    return run


def ceiling() -> Callable[[], dict[str, Any]]:
    """Noise ceiling of all genes."""
    import stpredict as stp

    sdata = slide(1)

    def run() -> dict[str, Any]:
        stp.tl.noise_ceiling(sdata)
        return {"genes": N_GENES, "spots": N_SPOTS, "sections": 1, "draws": 20}

    return run


def bounds() -> Callable[[], dict[str, Any]]:
    """Seconds for parts of the work on all genes, from a few of them."""
    from stpredict.tl.evaluation.numbers._metrics import correlation, gene_metrics, neighbor_graph
    from stpredict.tl.evaluation.numbers._parts import by_gene, by_spot, slices
    from stpredict.tl.evaluation.numbers._sides import Measured, Side, Span, centered_ranks

    sdata = slide(1)
    table, rows, columns = sdata["table"], np.arange(N_SPOTS), np.arange(N_GENES)
    graph = neighbor_graph(np.column_stack([sdata.shapes["s0"].geometry.x, sdata.shapes["s0"].geometry.y]))
    spans = [Span(slice(None), graph)]
    read = by_gene(table.X, rows, columns), by_gene(table.layers["predicted"], rows, columns)
    read_spots = by_spot(table.X, rows, columns), by_spot(table.layers["predicted"], rows, columns)
    chunks = slices(N_GENES, N_SPOTS)[:: N_GENES // N_SPOTS * 3]
    scale = N_GENES / sum(chunk.stop - chunk.start for chunk in chunks)
    spots = slices(N_SPOTS, N_GENES)[::10]
    scale_spots = N_SPOTS / sum(chunk.stop - chunk.start for chunk in spots)

    def run() -> dict[str, Any]:
        total: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any], times: float = scale) -> Any:
            start = time.process_time()
            result = work()
            total[name] = total.get(name, 0.0) + times * (time.process_time() - start)
            return result

        for chunk in chunks:
            x, y = timed("read", lambda chunk=chunk: (read[0](chunk), read[1](chunk)))
            timed("all_scores", lambda x=x, y=y: gene_metrics(*Measured(x, spans).beside(y)[0]))
            timed("sort", lambda x=x, y=y: (np.argsort(x), np.argsort(y)))
            timed("sort_and_rank", lambda x=x, y=y: (centered_ranks(x), centered_ranks(y)))
            timed("pcc_alone", lambda x=x, y=y: correlation(Side(x), Side(y)))
            timed(
                "graph_product", lambda x=x, y=y: (graph @ np.ascontiguousarray(x.T), graph @ np.ascontiguousarray(y.T))
            )
        for chunk in spots:
            timed("read_spots", lambda chunk=chunk: (read_spots[0](chunk), read_spots[1](chunk)), scale_spots)
        return {name: round(seconds, 3) for name, seconds in total.items()}

    return run


CASES: dict[str, Callable[[], Callable[[], dict[str, Any]]]] = {
    "genes": lambda: scoring(1, N_GENES, 0),
    "genes_4_sections": lambda: scoring(4, N_GENES, 0),
    "permutations_250": lambda: scoring(1, 250, 1000),
    "permutations_4_sections": lambda: scoring(4, N_GENES, 1000),
    "permutations": lambda: scoring(1, N_GENES, 1000),
    "noise_ceiling": ceiling,
    "bounds": bounds,
}


def run_case(name: str) -> dict[str, Any]:
    """Time one case in this process, after a small one that compiles what is compiled."""
    import stpredict as stp

    small = stp.datasets.synthetic(1, n_spots=30, n_genes=8)
    stp.tl.score(small, key="truth", n_perms=1)
    run = CASES[name]()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: making the slide took more than it holds
    start, cpu = time.perf_counter(), time.process_time()
    facts = run()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "case": name,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "before_gb": before,
        "peak_gb": memory("VmHWM"),
        **facts,
    }


def memory(field: str) -> float:
    """Of this process, in GB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1e6


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/score_speed.json"))
    parser.add_argument("--in-process", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process:
        print(json.dumps(run_case(args.in_process)))
        return
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    for name in args.only:
        done = subprocess.run(
            [sys.executable, __file__, "--in-process", name], stdout=subprocess.PIPE, text=True, check=True
        )
        results[name] = json.loads(done.stdout.splitlines()[-1])
        result = results[name]
        facts = ", ".join(f"{k} {v:.3g}" for k, v in result.items() if not isinstance(v, str) and k[-2:] != "gb")
        print(
            f"{name:24s} peak {result['peak_gb']:.2f} GB, {result['before_gb']:.2f} of it before; {facts}", flush=True
        )
    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
