"Toy models drawn at once beside a loop, the import of the package, and planting with its certificate."
import subprocess, sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from subspace_circuits.bench import figure, side_by_side
from subspace_circuits.toy_models import n_threads
from subspace_circuits.superposition import ExclusiveGroups, ResidualMLP, SparseFeatures, by_loop
from subspace_circuits.circuit_families import FAMILIES, plant


def _import_seconds(times=3):
    "Shortest of a few imports of the package, each in a fresh interpreter."
    code = "import time; start = time.perf_counter(); import subspace_circuits; print(time.perf_counter() - start)"
    said = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
            for _ in range(times)]
    return min(map(float, said))

def benchmark_toys()->list[dict]: # What was measured, with its bar
    """Time drawing at once beside a loop, a model on features beside the model as it is written, and the import of the
    package."""
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)/shape[-2]**.5
    groups, x = ExclusiveGroups([20, 20]), SparseFeatures(102, .01, low=-1.).sample(2048, g)
    deep = ResidualMLP(F.normalize(draw(102, 1000), dim=1), draw(3, 1000, 17), draw(3, 17, 1000))
    with n_threads(1):
        drawn = side_by_side({"loop": lambda: by_loop(groups.sizes, 500, g),
                              "at once": lambda: groups.sample(500*40, g)})
        answered = side_by_side({"as written": lambda: deep(x), "on features": lambda: deep.on_features(x)})
    loop, stream = 40*drawn["loop"]/drawn["at once"], answered["as written"]/answered["on features"]
    started = _import_seconds()
    return [figure("exclusive groups, a loop over drawing at once", loop, "x", "at least 50", loop >= 50),
            figure("residual MLP, as written over on features", stream, "x", "at least 1.5", stream >= 1.5),
            figure("import of the package", started, "s", "below .3", started < .3)]


def benchmark_models(
    families:tuple[str, ...]=tuple(FAMILIES), # Planted one after the other
)->Iterator[dict]: # What was measured, with its bar
    "Time toy models, the import of the package, and planting with its certificate."
    yield from benchmark_toys()
    with n_threads(1): spent = side_by_side({k: lambda k=k: plant(k, seed=1) for k in families}, 1)
    slowest = max(spent, key=spent.get)
    yield figure(f"planting, slowest of {len(families)}: {slowest}", spent[slowest], "s", "below 20",
                 spent[slowest] < 20)
